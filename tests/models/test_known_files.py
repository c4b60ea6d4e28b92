"""The message about a file that came to the wrong loader: whose it is, where it goes, and what loads it there."""

import json
import re
from importlib import import_module

import cascade_weights
import pytest
import torch
import weights
from conftest import WORKFLOWS
from pixstack.models_impl.known_files import KINDS, whose
from pixstack.models_impl.state_dict import read_file, write_file


def zeros(*keys):
    return {key: torch.zeros(1) for key in keys}


def shown(name: str) -> str:
    """A node as the canvas shows it; ours without the words for the search, in parentheses."""
    display = import_module("nodes").NODE_DISPLAY_NAME_MAPPINGS.get(name, name)
    return display.partition(" (")[0] if name.startswith("PixStack_") else display


def test_every_file_of_a_workflow_is_known_with_its_folder_and_our_node_that_loads_it(host):
    """What stands in for them has the released files' keys."""
    used = {(n["type"], m["directory"], m["name"]) for path in WORKFLOWS
            for n in json.loads(path.read_text(encoding="utf-8"))["nodes"]
            for m in n["properties"].get("models", []) if not m["name"].endswith(".json")}
    for node, folder, name in used:
        if node == "PixStack_PixArtLoader" and "ControlNet" in name:  # a bundle, of which it takes the base
            continue
        message = whose(read_file(host.models / folder / name)[0])
        assert f"it goes into models/{folder} " in message, (name, message)
        assert f"'{shown(node)}'" in message or not node.startswith("PixStack_"), (name, message)


IN_PAIRS = ("one half of a TAESD", "Depth Anything")  # lists these by more than one file


@pytest.mark.parametrize("kind", [k for k in KINDS if k.loader and k.name not in IN_PAIRS], ids=lambda kind: kind.name)
def test_a_node_that_is_named_lists_the_files_of_the_folder_that_is_named(host, kind):
    file = host.models / kind.folder / "known_file.safetensors"
    write_file(file, zeros("a"))
    try:
        info = host.object_info()  # a search in the frontend finds a node by either of its names
        nodes = {**info, **{shown(name): node for name, node in info.items()}}
        for node in re.findall(r"(?<!\w)'([^']+)'", kind.loader):
            assert file.name in json.dumps(nodes[node]["input"]), node
    finally:
        file.unlink()


@pytest.mark.parametrize("node, what, folder, make, kind, place, loader", [
    ("PixArtLoader", "a PixArt checkpoint", "diffusion_models", weights.tiny_pixelflow,
     "PixelFlow", "diffusion_models", "'Load PixelFlow Model'"),
    ("PixArtLoader", "a PixArt checkpoint", "diffusion_models",
     lambda path: write_file(path, weights.random_state(weights.PixArtControlNet(weights.tiny_pixart_config(), 2))),
     "a PixArt ControlNet", "controlnet", "'Load PixArt ControlNet'"),
    ("PixArtControlNetLoader", "a PixArt ControlNet", "controlnet", weights.tiny_pixart,
     "PixArt", "diffusion_models", "'Load PixArt Model'"),
    ("PixelFlowLoader", "a PixelFlow checkpoint", "diffusion_models", weights.tiny_t5,
     "a T5 text encoder", "text_encoders", "'Load T5 Text Encoder'"),
    ("FluxLoader", "a FLUX checkpoint", "diffusion_models", weights.tiny_pixelponder,
     "PixelPonder", "controlnet", "'Load PixelPonder'"),
    ("PixelPonderLoader", "a PixelPonder checkpoint", "controlnet", weights.tiny_flux,
     "FLUX", "diffusion_models", "core's 'Load Diffusion Model', or 'Load Small FLUX Model'"),
    ("PixelFlowTextEncoderLoader", "a T5 text encoder", "text_encoders", weights.tiny_clip_l,
     "a CLIP text encoder", "text_encoders", "core's 'Load CLIP'"),
    ("UltraPixelGuideLoader", "a guide of UltraPixel", "model_patches", cascade_weights.tiny_stage_c,
     "Stable Cascade's Stage C", "diffusion_models",
     "core's 'Load Diffusion Model', or 'Load Small Stable Cascade Model'"),
    ("UltraPixelStageALoader", "a Stage A of Stable Cascade", "vae", weights.tiny_vae,
     "a VAE", "vae", "core's 'Load VAE'"),
    ("HEDEdges", "HED", "annotators", cascade_weights.tiny_guide,
     "the guide of UltraPixel", "model_patches", "'Load UltraPixel Guide'"),
    ("ConsistencyDecoderLoader", "the consistency decoder", "vae", cascade_weights.tiny_stage_a,
     "Stable Cascade's Stage A", "vae", "'Load UltraPixel Stage A'"),
])  # fmt: skip
def test_a_loader_says_whose_the_wrong_file_is_and_what_loads_it(host, node, what, folder, make, kind, place, loader):
    name = "wrong_known.safetensors"
    make(host.models / folder / name)
    info = host.object_info()[f"PixStack_{node}"]["input"]["required"]
    inputs = {i: given["default"] for i, (_, given) in info.items() if "default" in given}
    inputs |= {i: name for i in info if i.endswith("_name")}
    graph = {"1": {"class_type": f"PixStack_{node}", "inputs": inputs},
             "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}}
    if node == "HEDEdges":
        graph["0"] = {"class_type": "EmptyImage", "inputs": dict(width=32, height=32, batch_size=1, color=0)}
        inputs["image"] = ["0", 0]
    try:
        run = host.run(graph)
    finally:
        (host.models / folder / name).unlink()
    message = str(run.error)
    assert name in message and f" is not {what}" in message
    where = f"In ComfyUI it goes into models/{place} and is loaded with {loader}"
    assert f"The keys are those of {kind}. {where}" in message
    (told,) = [data for event, data in run.events if event == "pixstack.wrong_file"]
    about = {"kind": kind, "folder": place, "file": name, "node_id": "1"}
    assert about.items() <= told.items() and graph["1"]["inputs"][told["input"]] == name
    assert f"'{shown(told['nodes'][0])}'" in loader


@pytest.mark.parametrize("kind", [k for k in KINDS if k.loader], ids=lambda kind: kind.name)
def test_the_nodes_of_a_kind_are_those_that_its_sentence_names(host, kind):
    named = re.findall(r"(?<!\w)'([^']+)'", kind.loader)
    assert {shown(node) for node in kind.nodes} <= set(named) and (kind.nodes or kind.name in IN_PAIRS)


def test_nobody_is_offered_another_node_for_a_file_that_only_its_own_takes(host):
    (host.models / "diffusion_models" / "damaged_known.safetensors").write_bytes(b"nothing")
    graph = {"1": {"class_type": "PixStack_FluxLoader",
                   "inputs": {"model_name": "damaged_known.safetensors", "dtype": "default"}},
             "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}}
    run = host.run(graph)
    assert run.error and not [event for event, _ in run.events if event == "pixstack.wrong_file"]


def test_a_checkpoint_with_its_vae_is_sent_to_core_s_checkpoint_loader():
    unet = zeros("model.diffusion_model.input_blocks.0.0.weight")
    assert whose(unet).endswith("models/diffusion_models and is loaded with core's 'Load Diffusion Model'.")
    whole = {**unet, **zeros("first_stage_model.decoder.conv_in.weight")}
    assert whose(whole) == ("The keys are those of Stable Diffusion. In ComfyUI it goes into models/checkpoints and is "
                            "loaded with core's 'Load Checkpoint'.")


def test_a_training_file_is_known_by_the_weights_inside():
    inner = zeros("module.input_hint_block_list_moe.0.0.weight")
    assert "those of PixelPonder" in whose({"state_dict": inner, "step": 3})


@pytest.mark.parametrize("tensors, sentence", [
    (zeros("a", "b", "c", "d"), "Its first keys are a, b, c."), ({}, "It holds no weights."),
])  # fmt: skip
def test_a_file_that_nobody_knows_is_described_by_its_keys(tensors, sentence):
    assert whose(tensors) == sentence


@pytest.mark.parametrize("keys, name", [
    (("down_blocks.0.resnets.0.conv1.weight", "controlnet_down_blocks.0.weight"), "a ControlNet for Stable Diffusion"),
    (("control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"),
     "a ControlNet for Stable Diffusion"),
    (("controlnet_blocks.0.weight", "pos_embed_input.proj.weight"), "a ControlNet for Stable Diffusion 3"),
    (("controlnet_blocks.0.weight", "pos_embed_input.weight"), "an XLabs ControlNet for FLUX"),
    (("blocks.0.scale_shift_table", "blocks.0.mlp.inverted_conv.conv.weight"), "Sana"),
])
def test_what_shares_keys_with_another_kind_is_distinguished_from_it(keys, name):
    assert whose(zeros(*keys)).startswith(f"The keys are those of {name}.")
