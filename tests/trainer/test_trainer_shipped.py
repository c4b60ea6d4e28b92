"""The shipped recipe files plan a run, on small networks in the places of the released ones. (UltraPixel's, which stand
on the most files, are planned in its own tests.)"""
import json
from pathlib import Path

import pytest
import tiny_pixart
import tiny_ponder
import tiny_run
from PIL import Image
from pixstack.models_impl.pixelflow import checkpoint as pixelflow_checkpoint
from pixstack.models_impl.pixelflow.config import PixelFlowConfig
from pixstack.models_impl.pixelflow.model import PixelFlow
from pixstack.models_impl.state_dict import write_file
from pixstack.trainer.cli import main as cli
from pixstack.trainer.config import check, load
from pixstack.trainer.training import build
from weights import tiny_hed

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 4096  # of T5-XXL's tokens
FILES = {p.name: p for p in sorted(load.TRAINER.glob("recipes/*/*.toml"))}
SHIPPED = [name for name in FILES if not name.startswith("ultrapixel")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Something small behind every file that the recipes name."""
    root = tmp_path_factory.mktemp("shipped")
    path = tiny_run.pictures(root / "set", size=64)
    for name in ("subject", "class"):
        (root / name).mkdir()
        for i in range(3):
            Image.new("RGB", (64, 64), (i, 9, 9)).save(root / name / f"{i}.png")
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        folder = root / "classes" / entry["class"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / entry["file"].split("/")[1]).write_bytes((path.parent / entry["file"]).read_bytes())
        (path.parent / entry["file"]).with_suffix(".txt").write_text(entry["captions"][0])
    tiny_pixart.released(root / "sigma.safetensors", depth=14, context_dim=WIDTH)
    tiny_pixart.released(root / "alpha.safetensors", depth=2, context_dim=WIDTH, latent_scale=0.18215, token_limit=120)
    tiny_pixart.released(root / "emoji.safetensors", depth=5, context_dim=192, latent_scale=0.18215, token_limit=32)
    flow = PixelFlowConfig(heads=2, head_dim=8, depth=1, context_dim=WIDTH, num_stages=4, resolution=256)
    write_file(root / "flow.safetensors", PixelFlow(flow).state_dict(), pixelflow_checkpoint.metadata(flow))
    tiny_pixart.t5(root / "t5", WIDTH)
    tiny_pixart.vae(root / "vae")
    tiny_hed(root / "hed.pth")
    tiny_pixart.vae(root / "vae16", 16)
    tiny_ponder.clip(root / "clip")
    for name, width in (("flux", WIDTH), ("flux_emoji", 192)):
        tiny_ponder.base(root / f"{name}.safetensors", context_dim=width)
    for kind in ("depth", "openpose"):
        (root / "set" / kind).mkdir()
        for file in (root / "set/images").glob("*.png"):
            (root / "set" / kind / file.name).write_bytes(file.read_bytes())
    return root


def words(root, name):
    """What a person would change about a shipped recipe: where the files are."""
    raw = load.read_toml(FILES[name])
    found = [f"out={root}/runs/{name}", "device=cpu"]
    kind, recipe = raw["data"].get("kind", "folder"), raw["recipe"]["name"]
    on_flux = recipe in ("flux", "pixelponder")
    found.append(f"data.path={root}/" + {"jsonl": "set/data.jsonl", "classes": "classes"}.get(kind, "set/images"))
    if raw.get("samples", {}).get("classes"):  # those of ImageNet and of emoji are not here
        found.append("samples.classes=[0, 5]")
    if "prior_path" in raw["data"]:
        found += [f"data.path={root}/subject", f"data.prior_path={root}/class", "data.prior_count=0"]
    if "vae" in raw:
        found.append(f"vae.path={root}/vae{'16' if on_flux else ''}")
    encoder = raw.get("text", {}).get("encoder", "small")
    if encoder != "small":  # what lies in assets is small itself
        found.append(f"text.encoder={ROOT / encoder if encoder.startswith('assets/') else root / 't5'}")
    if "clip" in raw.get("text", {}):
        found.append(f"text.clip={root}/clip")
    if recipe == "pixelponder":
        found += [f"recipe.base={root}/flux{'_emoji' if 'emoji' in name else ''}.safetensors",
                  "model.selector_width=128", f"cache.folder={root}/cache"]
    if "hed" in raw["recipe"]:
        found.append(f"recipe.hed={root}/hed.pth")
    if recipe.startswith("pixart") and "init_from" in raw:
        found.append(f"init_from={root}/{raw['model']['variant'] if 'model' in raw else 'emoji'}.safetensors")
    if "annotator" in raw["recipe"]:
        found.append(f"recipe.annotator={root}/hed.pth")
    return found


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_plans_its_run(files, name, capsys):
    cli.main(["train", str(FILES[name]), "--dry-run", *words(files, name)])
    output = capsys.readouterr().out
    for part in ("parameters ", "memory     about", "time       about", "first batch"):
        assert part in output, output
    assert not (files / "runs" / name).exists()


def test_the_first_lora_needs_nothing_but_a_folder_of_pictures(tmp_path, monkeypatch):
    Image.new("RGBA", (40, 30), (150, 0, 200, 0)).save(tmp_path / "a.png")
    Image.new("RGB", (30, 40), (150, 0, 200)).save(tmp_path / "b.jpg")
    (tmp_path / "b.txt").write_text("purple monster", encoding="utf-8")
    monkeypatch.chdir(ROOT)
    settings = check.load("recipes/pixart/pixart_first_lora.toml", [f"data.path={tmp_path}", "data.caption=monster"])
    assert [one.captions for one in build.collection(settings).train] == [("monster",), ("purple monster",)]


@pytest.mark.parametrize("name", SHIPPED)
def test_an_unknown_setting_of_a_shipped_recipe_is_refused(files, name):
    with pytest.raises(ValueError, match="recipe.nonsense is not a setting"):
        check.load(FILES[name], [*words(files, name), "recipe.nonsense=1"])
