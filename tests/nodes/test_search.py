"""What people type into the search of the canvas brings the right node up first or second."""

import json
import sys

import pytest
from conftest import ROOT
from frontend_search import found, fuzzy, of_text, standing

BY_NAME = [  # what is typed, ids without PixStack_ of which one must be first or second: on every host
    ("4k", "UltraPixelCanvas"), ("aspect ratio", "PixArtCanvas"), ("pixelflow empty latent", "PixelFlowCanvas"),
    ("soft edge", "HEDEdges"), ("softedge", "HEDEdges"), ("hed", "HEDEdges"), ("openpose", "FindPoses"),
    ("dwpose", "FindPoses"), ("draw pose", "DrawPoses"), ("preprocessor", "HEDEdges CannyEdges DepthMap FindPoses"),
    ("canny", "CannyEdges"), ("depth", "DepthMap"), ("stable cascade", "UltraPixelCanvas UltraPixelSampler"),
    ("cascade 4k", "UltraPixelCanvas"), ("ultrapixel", "UltraPixelGuide UltraPixelSampler UltraPixelCanvas"),
    ("ultrapixel sampler", "UltraPixelSampler"), ("stage a", "UltraPixelStageALoader"),
    ("stage b", "UltraPixelStageB"), ("pixart lcm", "PixArtSampler"), ("dmd", "PixArtSampler"),
    ("sa-solver", "PixArtSampler"), ("styles", "PixArtPrompt"), ("imagenet", "PixelFlowClass"),
    ("pixart scheduler", "PixArtSigmas"), ("pixelflow scheduler", "PixelFlowSigmas"),
    ("pixart ksampler", "PixArtSampler"), ("pixelflow ksampler", "PixelFlowSample"),
    ("pixelflow sampler", "PixelFlowSampler"), ("pixelflow", "PixelFlowSampler PixelFlowClass"),
    ("pixart", "PixArtRightHalf PixArtTextEncode PixArtPrompt"), ("load pixart", "PixArtLoader"),
    ("pixart sigma", "PixArtLoader PixArtSigmas"), ("pixart lora", "PixArtLoraLoader"),
    ("pixart controlnet", "PixArtControlNetLoader PixArtControlNetApply"), ("multi controlnet", "PixelPonderApply"),
    ("pixelponder", "PixelPonderLoader PixelPonderApply PixelPonderCondition PixelPonderMap"),
    ("small flux", "FluxLoader"), ("small stable cascade", "CascadeLoader"), ("t5", "PixelFlowTextEncoderLoader"),
    ("text encoder", "PixelFlowTextEncoderLoader"), ("consistency decoder", "ConsistencyDecoderLoader"),
    ("null caption", "PixArtNullCaption"), ("emoji", "ExamplePicture"), ("data set", "LoadEntry SaveEntry"),
    ("ultrapixel vae", "UltraPixelStageALoader"), ("pixelflow class", "PixelFlowClass"),
    ("pixart style", "PixArtPrompt"), ("compare pictures", "ComparePictures"),
    ("paint conditions", "PaintConditions"), ("pixelponder conditions", "PixelPonderConditions"),
]  # fmt: skip
BY_ALIAS = [  # where the host has search_aliases, which 0.3.75 lacks
    ("2k", "UltraPixelCanvas"), ("8k", "UltraPixelCanvas"), ("ultra hd", "UltraPixelCanvas"),
    ("pixart empty latent", "PixArtCanvas"), ("pixart resolution", "PixArtCanvas"), ("buckets", "PixArtCanvas"),
    ("size picker", "PixArtCanvas"), ("scribble", "HEDEdges"), ("skeleton", "FindPoses DrawPoses"),
    ("edge detection", "CannyEdges"), ("midas", "DepthMap"), ("learned word", "UltraPixelPersonalise"),
    ("stable cascade lora", "UltraPixelPersonalise"), ("hires fix", "UltraPixelSampler"),
    ("one step", "PixArtSampler"), ("style presets", "PixArtPrompt"), ("style transfer", "PixArtReferenceCanvas"),
    ("reference image", "PixArtReferenceCanvas"), ("class label", "PixelFlowClass"), ("pixart alpha", "PixArtLoader"),
    ("lcm lora", "PixArtLoraLoader"), ("hed controlnet", "PixArtControlNetLoader"),
    ("several controlnets", "PixelPonderApply"), ("regional controlnet", "PixelPonderApply PixelPonderCondition"),
    ("flux controlnet", "PixelPonderLoader"), ("flan t5", "PixelFlowTextEncoderLoader"),
    ("dalle", "ConsistencyDecoderLoader"), ("unconditional", "PixArtNullCaption"),
    ("micro conditioning", "PixArtSizeCondition"), ("jsonl", "LoadEntry SaveEntry"),
    ("low vram", "UltraPixelStageBTiles"), ("inpaint controlnet", "UltraPixelInpaintHint"),
    ("negative prompt", "PixArtPrompt"), ("before after", "ComparePictures"), ("image comparer", "ComparePictures"),
    ("paint mask", "PaintConditions"), ("several hints", "PixelPonderConditions"),
]  # fmt: skip


@pytest.fixture(scope="module")
def info(host) -> dict:
    return host.object_info()


def brings_up(info: dict, typed: str, wanted: str):
    first = found(typed, info)[:2]
    assert {f"PixStack_{name}" for name in wanted.split()} & set(first), first


@pytest.mark.parametrize(("typed", "wanted"), BY_NAME)
def test_a_search_brings_the_right_node_up(info, typed, wanted):
    brings_up(info, typed, wanted)


@pytest.mark.parametrize(("typed", "wanted"), BY_ALIAS)
def test_other_words_for_a_node_bring_it_up(info, typed, wanted):
    if not any(node.get("search_aliases") for node in info.values()):
        pytest.skip("this ComfyUI knows no search_aliases")
    brings_up(info, typed, wanted)


@pytest.mark.parametrize(("typed", "wanted"), [
    ("4k", "UltraPixelCanvas"), ("soft edge", "HEDEdges"), ("imagenet", "PixelFlowClass"), ("dmd", "PixArtSampler"),
    ("multi controlnet", "PixelPonderApply"), ("aspect ratio", "PixArtCanvas"), ("sa-solver", "PixArtSampler"),
])  # fmt: skip
def test_english_words_find_a_node_whose_name_is_translated(info, typed, wanted):
    if not any(node.get("search_aliases") for node in info.values()):
        pytest.skip("this ComfyUI knows no search_aliases")
    chinese = json.loads((ROOT / "locales/zh/nodeDefs.json").read_text(encoding="utf-8"))
    shown = {name: {**node, "display_name": chinese.get(name, node).get("display_name")} for name, node in info.items()}
    brings_up(shown, typed, wanted)


def test_sixty_searches_are_tried():
    assert len({typed for typed, _ in BY_NAME + BY_ALIAS}) >= 60


def test_every_node_can_be_found_by_other_words_where_the_host_knows_them(info):
    ours = {name: node for name, node in info.items() if name.startswith("PixStack_")}
    if not any(node.get("search_aliases") for node in ours.values()):
        pytest.skip("this ComfyUI knows no search_aliases")
    assert all(node["search_aliases"] for node in ours.values())


def test_the_t5_of_every_family_stands_in_none_of_their_menus(info):
    families = {info[f"PixStack_{name}"]["category"] for name in ("PixelFlowLoader", "PixArtLoader", "FluxLoader")}
    assert info["PixStack_PixelFlowTextEncoderLoader"]["category"] not in families


def test_expert_inputs_are_marked_for_the_browser(info):
    loader = info["PixStack_PixArtLoader"]["input"]["required"]
    assert [name for name, spec in loader.items() if spec[1].get("advanced")] == [
        "variant", "prediction", "positions", "weights"]


def test_an_advanced_input_that_is_not_there_is_refused(host):
    schema = next(module.schema for name, module in sys.modules.items() if name.endswith(".nodes.schema"))
    with pytest.raises(ValueError, match="PixStack_Toy has no inputs colour"):
        schema(node_id="PixStack_Toy", display_name="Toy", inputs=[], advanced=("colour",))


@pytest.mark.parametrize(("word", "text", "score"), [
    ("canny", "Canny", 0.0), ("canny", "Canny Edges", 0.001), ("edges", "Canny Edges", 0.06),
    ("openpse", "OpenPose", 1 / 7),
    ("4k", "k", None), ("latent", "UltraPixel Canvas (Stable Cascade, Latent)", None),
])  # fmt: skip
def test_the_search_of_the_tests_scores_as_fuse_does(word, text, score):
    assert fuzzy(word, text) == (None if score is None else pytest.approx(score))


def test_every_word_must_be_found():
    assert of_text("soft edge", "HED Edges") is None


def test_a_word_that_begins_a_name_stands_before_one_within_it():
    tiers = [standing("canny", text, 0.1)[0] for text in ("Canny", "Canny Edges", "UltraPixel Canny", "Uncanny")]
    assert tiers == [0, 1, 2, 3]
