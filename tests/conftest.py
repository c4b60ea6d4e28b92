import gc
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from pixstack.tools.comfyui import prepare_torch
from pixstack.tools.host import Host
from pixstack.tools.server import served
from pixstack.tools.workflow import shipped

pytest_plugins = ["parity_cases"]
prepare_torch()  # before any test imports transformers, which imports torchvision

ROOT = Path(__file__).resolve().parents[1]
ARTIFACTS = ROOT / "tests" / "artifacts"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SHIPPED = shipped()  # short name -> workflow
WORKFLOWS = list(SHIPPED.values())


def pytest_generate_tests(metafunc):
    if "workflow" in metafunc.fixturenames:
        metafunc.parametrize("workflow", WORKFLOWS, ids=list(SHIPPED))


def pytest_collection_finish():
    rest_from_collecting()


def rest_from_collecting():
    """What is imported by now stays, and to look through millions of objects for garbage every few moments takes a
    tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def pytest_collection_modifyitems(items):
    """Long files first, so that no process still runs one when the others are done."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session")
def host(tmp_path_factory) -> Host:
    """The one ComfyUI of this process: `host.run(graph)`, weights into `host.models / "diffusion_models"`."""
    import cascade_weights
    import dynamic_vram

    host = Host(_base(tmp_path_factory)).start()
    if way := dynamic_vram.wanted():
        dynamic_vram.begin(way)
    take_stand_ins()
    cascade_weights.shrink_core()
    return host


@pytest.fixture(scope="session")
def info(host) -> dict[str, dict]:
    """What the nodes take and give, by type: /object_info as of the first test that asks."""
    return host.object_info()


def take_stand_ins():
    """Core's loaders fix T5-XXL's and CLIP-L's sizes at up to billions of parameters, and FLUX at 24 heads; those of
    the tests' stand-ins fit any machine. Newer ComfyUIs recognise T5-XXL by the size that the stand-in lacks."""
    import comfy.model_detection
    import comfy.sd
    from weights import CLIP_L_SHRUNK, T5XXL_SHRUNK, is_tiny_t5xxl, narrow_flux

    load_clip, detect = comfy.sd.load_clip, comfy.model_detection.detect_unet_config
    detect_text = comfy.sd.detect_te_model

    def load(*args, model_options=None, **kwargs):
        shrunk = dict(t5xxl_model_config=T5XXL_SHRUNK, model_config=dict(CLIP_L_SHRUNK))  # core adds to the latter
        return load_clip(*args, model_options={**(model_options or {}), **shrunk}, **kwargs)

    comfy.sd.load_clip = load
    comfy.sd.detect_te_model = lambda sd: comfy.sd.TEModel.T5_XXL if is_tiny_t5xxl(sd) else detect_text(sd)
    comfy.model_detection.detect_unet_config = lambda *args, **kwargs: narrow_flux(detect(*args, **kwargs))


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict:
    """Sections of a text encoder and a VAE, for the trainer's tests of PixArt. Other recipes' tests have a
    fixture of this name of their own, and so for `path`."""
    import tiny_pixart

    return tiny_pixart.parts(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """The list of a data set of pictures of 64 pixels."""
    import tiny_run

    return tiny_run.pictures(tmp_path_factory.mktemp("data") / "set", size=64)


@dataclass(frozen=True)
class Server:
    address: str
    base: Path


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Server:
    """A ComfyUI server of its own process, as a person starts it. PIXSTACK_FRONTEND_ROOT: another frontend's folder."""
    import dynamic_vram

    base = _base(tmp_path_factory)
    if way := dynamic_vram.wanted():
        dynamic_vram.begin_in_server(base, way)
    frontend = os.environ.get("PIXSTACK_FRONTEND_ROOT")
    with served(base, base / "server.log", ["--front-end-root", frontend] if frontend else []) as address:
        yield Server(address, base)


def _base(tmp_path_factory) -> Path:
    """A base folder with something behind every file that a shipped workflow names."""
    import bases  # and with it transformers: only for the tests that need a ComfyUI

    return bases.filled(tmp_path_factory.mktemp("comfyui"), bases.shared_folder(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="module")
def rehearsed_on_gpu(request, tmp_path_factory) -> dict:
    """The results of a file's REHEARSALS on the virtual GPU, by name: for `virtual_gpu.check`."""
    import virtual_gpu

    return virtual_gpu.in_child(request, tmp_path_factory.getbasetemp())


def needed(what: str | None, why: str) -> str:
    """`what`, or a skip that says why it is missing; a failure on CI, where everything must run."""
    if what:
        return what
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"{why}, and CI is set", pytrace=False)
    pytest.skip(why)
