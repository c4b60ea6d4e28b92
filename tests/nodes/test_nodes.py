"""What holds for every node: named, explained and translated. test_help_pages.py has its documentation."""

import json
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WIDGETS = {"INT": ("min", "max", "default"), "FLOAT": ("min", "max", "step", "default"), "COMBO": ("options",)}


@pytest.fixture(scope="module")
def ours(host):
    """Schemas of our nodes by id."""
    known = import_module("nodes").NODE_CLASS_MAPPINGS
    schemas = {name: node.define_schema() for name, node in known.items() if name.startswith("PixStack_")}
    assert schemas
    return schemas


def test_every_node_says_what_it_is(ours):
    for name, schema in ours.items():
        assert schema.node_id == name
        assert schema.display_name and schema.description and schema.category.startswith("pixstack/"), name


def test_every_input_and_output_has_a_tooltip(ours):
    missing = [f"{name}.{part.id or part.display_name}" for name, schema in ours.items()
               for part in (*schema.inputs, *schema.outputs) if not part.tooltip]
    assert not missing


def test_every_output_with_an_id_says_what_it_is_called(ours):
    missing = [f"{name}.{out.id}" for name, schema in ours.items() for out in schema.outputs
               if out.id and not out.display_name]
    assert not missing, "the canvas shows the bare type of these"


def test_every_number_has_its_range_and_every_menu_its_choices(ours):
    for name, schema in ours.items():
        for part in schema.inputs:
            described = part.as_dict()
            for entry in WIDGETS.get(part.get_io_type(), ()):
                assert entry in described, f"{name}.{part.id} has no {entry}"


def names_of(schema) -> set[str]:
    """What the inputs are called; slots that grow where ComfyUI can go by their common name."""
    return {part.id.partition(".")[0] for part in schema.inputs}


@pytest.mark.parametrize("language", sorted(p.parent.name for p in (ROOT / "locales").glob("*/nodeDefs.json")))
def test_a_translation_knows_every_node_and_every_input(ours, language):
    translated = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(translated) == set(ours)
    for name, schema in ours.items():
        assert translated[name]["display_name"] and translated[name]["description"]
        assert set(translated[name]["inputs"]) == names_of(schema), name
        for part in names_of(schema):
            assert translated[name]["inputs"][part]["tooltip"], f"{name}.{part}"
        assert set(translated[name]["outputs"]) == {str(i) for i in range(len(schema.outputs))}, name


EMBEDDED = {path.name for path in (ROOT / "assets").rglob("*.safetensors")}
LOADERS = ("CheckpointLoaderSimple", "UNETLoader", "CLIPLoader", "DualCLIPLoader", "VAELoader", "ControlNetLoader")


def choices(described: dict) -> list[list[str]]:
    menus = [spec for spec in described["input"]["required"].values() if spec]
    return [spec[0] if isinstance(spec[0], list) else spec[1].get("options", []) for spec in menus]


@pytest.mark.parametrize("loader", LOADERS)
def test_no_loader_of_core_preselects_an_embedded_file(host, loader):
    """Else ComfyUI's default graph, of which somebody has downloaded a part, draws with it."""
    for menu in choices(host.object_info()[loader]):
        assert not menu or menu[0] not in EMBEDDED


def test_a_saved_graph_whose_vae_is_loaded_by_core_keeps_working(host):
    import folder_paths

    menu = choices(host.object_info()["VAELoader"])[0]
    assert menu[-2:] == ["flux_emoji_vae.safetensors", "pixart_emoji_vae.safetensors"]
    assert "pixel_space" in menu and folder_paths.get_full_path("vae", menu[-1])


def test_our_loaders_list_the_files_of_the_user_before_the_embedded_ones(ours, host):
    models = {"PixArtLoader": "model_name", "PixelFlowTextEncoderLoader": "encoder_name",
              "PixArtLoraLoader": "lora_name", "PixArtControlNetLoader": "control_net_name",
              "PixelPonderLoader": "control_net_name"}
    for name, entry in models.items():
        menu = next(part for part in ours[f"PixStack_{name}"].inputs if part.id == entry).options
        own = [file in EMBEDDED for file in menu]
        assert any(own) and own == sorted(own), menu


def test_a_file_of_the_user_comes_before_the_embedded_one_of_its_name(ours, host):
    files = next(module for name, module in sys.modules.items() if name.endswith("nodes.host.common.files"))
    name = "pixelflow_emoji_t5.safetensors"
    assert files.find("text_encoders", name) == str(ROOT / "assets" / "text_encoders" / name)
    mine = host.models / "text_encoders" / name
    mine.write_bytes(b"")
    try:
        assert files.find("text_encoders", name) == str(mine)
    finally:
        mine.unlink()
    assert files.find("text_encoders", "../vae/pixart_emoji_vae.safetensors") is None


@pytest.mark.parametrize("language", sorted(p.name for p in (ROOT / "locales").iterdir()))
def test_the_texts_of_the_browser_are_there_in_every_language(language):
    """Those that scripts ask for, with the same gaps to fill in."""
    english, translated = (_texts(ROOT / "locales" / one / "main.json") for one in ("en", language))
    assert set(english) == set(translated)
    gaps = re.compile(r"\{\w+\}")
    assert [key for key, text in english.items()
            if sorted(gaps.findall(text)) != sorted(gaps.findall(translated[key]))] == []
    scripts = [path.read_text(encoding="utf-8") for path in (ROOT / "web").glob("*.*js")]
    asked = {key for script in scripts for key in re.findall(r"\btext\('([\w.]+)'", script)}
    assert asked <= set(english)


@pytest.mark.parametrize("language", sorted(p.parent.name for p in (ROOT / "locales").glob("*/settings.json")))
def test_the_settings_of_the_browser_are_translated(language):
    translated = json.loads((ROOT / "locales" / language / "settings.json").read_text(encoding="utf-8"))
    scripts = [path.read_text(encoding="utf-8") for path in (ROOT / "web").glob("*.js")]
    switches = {f"PixStack_{name}" for script in scripts for name in re.findall(r"(?<!\.)toggle\('(\w+)'", script)}
    others = {key for key in translated if any(f"'{key.replace('_', '.')}'" in script for script in scripts)}
    assert switches and set(translated) == switches | others
    assert all(one["name"] and one["tooltip"] for one in translated.values())


def _texts(path: Path) -> dict[str, str]:
    """The texts of a file of a language by their keys, parts joined by dots."""
    def flat(part, name):
        return {name: part} if isinstance(part, str) else {
            key: text for inner, below in part.items() for key, text in flat(below, f"{name}.{inner}").items()}

    return {key.removeprefix("pixstack."): text for key, text in
            flat(json.loads(path.read_text(encoding="utf-8"))["pixstack"], "pixstack").items()}
