"""The T5 encoders as ComfyUI CLIP: the right tokens, the right numbers, the real length."""

import logging
from importlib import import_module
from types import SimpleNamespace

import dynamic_vram
import pytest
import torch
from pixstack.models_impl.state_dict import write_file
from pixstack.models_impl.text.t5 import TextEncoder
from transformers import T5Config, T5ForConditionalGeneration, T5TokenizerFast
from weights import tiny_t5


@pytest.fixture(scope="module")
def text(host):
    folder = host.models / "text_encoders"
    ours = tiny_t5(folder / "small_t5.safetensors").eval()
    torch.manual_seed(0)
    # What flan-t5-xl is, narrow: the standard vocabulary, gated gelu, no metadata, and a decoder that is of no use.
    flan = T5ForConditionalGeneration(T5Config(
        d_model=32, d_ff=48, d_kv=8, num_heads=3, num_layers=2, feed_forward_proj="gated-gelu"
    )).eval()
    write_file(folder / "flan.safetensors", {k: v.clone() for k, v in flan.state_dict().items()})
    standard = import_module("comfy.text_encoders.sd3_clip").__file__.replace("sd3_clip.py", "t5_tokenizer")
    return SimpleNamespace(
        ours=ours, flan=flan, tokenizer=T5TokenizerFast.from_pretrained(standard),
        load=lambda name, **more: import_module("nodes").NODE_CLASS_MAPPINGS[
            "PixStack_PixelFlowTextEncoderLoader"].execute(
                **{"encoder_name": name, "dtype": "default", "device": "default", **more})[0],
    )


def encode(clip, prompt: str):
    with torch.inference_mode():
        ((tokens, rest),) = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    return tokens


def ids(clip, prompt: str) -> list[int]:
    (row,) = clip.tokenize(prompt)["t5"]
    return [token for token, _ in row]


PROMPTS = ["a red apple", "", "A Cat, on the  blue car"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_trained_encoder_gives_in_comfyui_what_it_gave_in_training(text, prompt):
    clip = text.load("small_t5.safetensors")
    tokens, mask = text.ours.tokenize([prompt])
    assert ids(clip, prompt) == tokens[0].tolist()
    with torch.inference_mode():
        expected = text.ours(tokens, mask)
    assert (encode(clip, prompt) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_flan_t5_gives_what_transformers_gives_for_the_padded_and_masked_prompt(text, prompt):
    padded = text.tokenizer(prompt, padding="max_length", max_length=64, return_tensors="pt")
    length = int(padded.attention_mask.sum())
    clip = text.load("flan.safetensors")
    assert ids(clip, prompt) == padded.input_ids[0, :length].tolist()
    with torch.inference_mode():
        expected = text.flan.encoder(**padded).last_hidden_state[:, :length]
    assert (encode(clip, prompt) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_empty_prompt_is_only_its_end_token(text):
    assert ids(text.load("flan.safetensors"), "") == [1]
    assert encode(text.load("flan.safetensors"), "").shape == (1, 1, 32)


@pytest.mark.parametrize("name, limit", [("flan.safetensors", 512), ("small_t5.safetensors", 64)])
def test_a_long_prompt_is_cut_as_in_the_reference_and_said_so(text, name, limit, caplog):
    clip, prompt = text.load(name), "a red apple " * limit
    with caplog.at_level(logging.WARNING):
        found = ids(clip, prompt)
    assert len(found) == limit and found[-1] == 1
    assert f"reads {limit - 1} tokens" in caplog.text
    if limit == 512:
        assert found == text.tokenizer(prompt, truncation=True, max_length=limit).input_ids
    else:
        assert found == text.ours.tokenize([prompt])[0][0].tolist()


def test_a_short_prompt_warns_of_nothing(text, caplog):
    ids(text.load("flan.safetensors"), "a red apple")
    assert "tokens" not in caplog.text


def test_a_weighted_word_moves_the_tokens(text):
    clip = text.load("flan.safetensors")
    plain, weighted = encode(clip, "a red apple"), encode(clip, "a (red:1.5) apple")
    assert plain.shape == weighted.shape
    assert not torch.allclose(plain, weighted)


@pytest.mark.parametrize("dtype, kind", [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_storage_may_be_chosen(text, dtype, kind):
    clip = text.load("flan.safetensors", dtype=dtype, device="cpu")
    assert dynamic_vram.stored_dtype(clip.cond_stage_model.t5.transformer.shared) == kind
    exact = encode(text.load("flan.safetensors"), "a red apple")
    assert encode(clip, "a red apple").dtype == torch.float32
    assert (encode(clip, "a red apple") - exact).norm() < 0.03 * exact.norm()


def test_half_an_encoder_is_refused(text, host):
    weights = {k: v for k, v in text.ours.weights().items() if "layer_norm" not in k}
    write_file(host.models / "text_encoders" / "half.safetensors", weights, text.ours.metadata())
    with pytest.raises(ValueError, match="half.safetensors is not a complete T5 encoder: 3 keys are missing"):
        text.load("half.safetensors")


def test_an_encoder_that_comfyui_s_t5_cannot_be_is_refused(text, host):
    encoder = TextEncoder({**text.ours.config, "relative_attention_num_buckets": 16}, text.ours.tokenizer)
    write_file(host.models / "text_encoders" / "buckets.safetensors", encoder.weights(), encoder.metadata())
    with pytest.raises(ValueError, match="knows only relative_attention_num_buckets=32"):
        text.load("buckets.safetensors")
