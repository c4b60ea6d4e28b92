"""Nodes called from Python, as a graph would call them, with the models and pictures that come with PixStack."""
from __future__ import annotations

import functools
import sys
from importlib import import_module

from PIL import Image
from torch import Tensor

from .drawing import pictures

SMILE = "smiling face with sunglasses"
PROMPTS = {"red apple": "red apple", "red heart": "red heart", SMILE: "sunglasses", "cat face": "cat face"}
"""Prompts of the emoji models, and what is written below their pictures."""
SEED = 1


def call(node: str, **inputs) -> tuple:
    """The outputs of a node; ours are named without PixStack_."""
    known = import_module("nodes").NODE_CLASS_MAPPINGS
    kind = known.get(f"PixStack_{node}") or known[node]
    if hasattr(kind, "define_schema"):
        return kind.execute(**inputs).args
    return getattr(kind(), kind.FUNCTION)(**inputs)


def module(node: str):
    """The module of one of our nodes, as ComfyUI loaded it."""
    return sys.modules[import_module("nodes").NODE_CLASS_MAPPINGS[f"PixStack_{node}"].__module__]


@functools.cache
def clip(kind: str = "pixelflow, pixart"):
    return call("PixelFlowTextEncoderLoader", encoder_name="pixelflow_emoji_t5.safetensors", dtype="default",
                device="default", type=kind)[0]


@functools.cache
def vae(name: str):
    return call("VAELoader", vae_name=name)[0]


@functools.cache
def pixelflow_model():
    return call("PixelFlowLoader", model_name="pixelflow_emoji_64.safetensors", weights="ema", dtype="default")[0]


@functools.cache
def pixart_model():
    return call("PixArtLoader", model_name="pixart_emoji_128.safetensors", variant="auto", prediction="auto",
                positions="auto", weights="ema", dtype="default")[0]


@functools.cache
def flux_model():
    model, = call("FluxLoader", model_name="flux_emoji_128.safetensors", dtype="default")
    return call("ModelSamplingFlux", model=model, max_shift=1.15, base_shift=0.5, width=128, height=128)[0]


def example(name: str) -> Tensor:
    return call("ExamplePicture", picture=name)[0]


def prompt(text: str, kind: str = "pixelflow, pixart"):
    return call("CLIPTextEncode", clip=clip(kind), text=text)[0]


def pixelflow(positive: str, latent: dict | None = None, start_stage: int = 0, end_stage: int = -1) -> Image.Image:
    if latent is None:
        latent, = call("PixelFlowCanvas", model=pixelflow_model(), shape="square", width=64, height=64, batch_size=1)
    drawn = call("PixelFlowSample", model=pixelflow_model(), positive=prompt(positive), negative=prompt(""),
                  latent=latent, seed=SEED, steps=10, cfg=4.0, shift=1.0, solver="euler", start_stage=start_stage,
                 end_stage=end_stage)[0]
    return pictures(call("VAEDecode", samples=drawn, vae=vae("pixel_space"))[0])[0]


def pixart(positive, negative=None, model=None, cfg: float = 4.5) -> Image.Image:
    """positive, negative: texts or encoded prompts."""
    canvas = pixart_canvas()
    positive = prompt(positive) if isinstance(positive, str) else positive
    drawn, = call("KSampler", model=model or pixart_model(), positive=positive, negative=negative or prompt(""),
                  latent_image=canvas, seed=SEED, steps=20, cfg=cfg, sampler_name="dpmpp_2m", scheduler="sgm_uniform",
                  denoise=1.0)
    return decoded(drawn)


def pixart_canvas() -> dict:
    return call("PixArtCanvas", resolution="auto", shape="1:1", width=128, height=128, batch_size=1,
                model=pixart_model())[0]


def decoded(latent: dict) -> Image.Image:
    return pictures(call("VAEDecode", samples=latent, vae=vae("pixart_emoji_vae.safetensors"))[0])[0]


def flux(positive, negative, cfg: float) -> tuple[Image.Image, dict]:
    latent, = call("EmptySD3LatentImage", width=128, height=128, batch_size=1)
    drawn, = call("KSampler", model=flux_model(), positive=positive, negative=negative, latent_image=latent, seed=SEED,
                  steps=20, cfg=cfg, sampler_name="euler", scheduler="simple", denoise=1.0)
    return pictures(call("VAEDecode", samples=drawn, vae=vae("flux_emoji_vae.safetensors"))[0])[0], drawn


def edges_of(name: str) -> Tensor:
    return call("CannyEdges", image=example(name), detector="opencv", low=100.0, high=200.0, resolution=0)[0]


def forget():
    """Let the models go while core's modules are there, which they look for."""
    for kept in (clip, vae, pixelflow_model, pixart_model, flux_model):
        kept.cache_clear()
