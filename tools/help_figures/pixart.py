"""PixArt."""
from __future__ import annotations

from importlib import import_module

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ...models_impl.pixart import buckets
from . import figure
from .calls import PROMPTS, SEED, call, clip, decoded, example, module, pixart, pixart_canvas, pixart_model, prompt, vae
from .drawing import BLUES, DIM, GAP, INK, ORANGE, SMALL, WIDE, Drawing, Photo, framed, gray, pictures, wrapped


@figure
def PixArtLoader():
    return Photo([(pixart(text), short) for text, short in PROMPTS.items()])


@figure
def PixArtTextEncode():
    def encode(text):
        return call("PixArtTextEncode", clip=clip(), text=text, tokens="auto", clean_caption=False,
                    model=pixart_model())[0]

    texts = ("red apple", "green apple", "red heart", "green heart")
    return Photo([(pixart(encode(text), encode("")), text) for text in texts])


@figure
def PixArtNullCaption():
    """Tokens of a prompt, of the stored caption under `mask` positive, and under all."""
    tokenizer = import_module("comfy.text_encoders.pixart_t5").PixArtTokenizer()
    text = "a lighthouse on a cliff"
    (tokens,), = tokenizer.tokenize_with_weights(text).values()
    drawing, most, columns = Drawing(300), 120, 30
    drawing.text(GAP, 12, f"positive:  {text}", INK, SMALL)
    for row, (name, kept) in enumerate((("mask: positive", len(tokens)), ("mask: all", most))):
        top = 50 + 124 * row
        drawing.text(GAP, top, f"{name},  {kept} of {most} tokens", ORANGE if row == 0 else BLUES[2], SMALL)
        for i in range(most):
            x, y = GAP + i % columns * 20.6, top + 30 + i // columns * 20.6
            drawing.box(x, y, x + 16, y + 16, (ORANGE if row == 0 else BLUES[2]) if i < kept else "#313b48")
    return drawing


@figure
def PixArtSizeCondition():
    drawing = Drawing(300)
    drawing.text(GAP, 12, "what the network is conditioned on beside the prompt:", DIM, SMALL)
    left = GAP
    for width, height in ((1024, 1024), (2048, 1152), (400, 600)):
        (_, entry), = call("PixArtSizeCondition", conditioning=[[torch.zeros(1, 1, 1), {}]], width=width, height=height,
                           aspect_ratio=0.0)[0]
        w, h = width / 11, height / 11
        drawing.box(left, 164 - h, left + w, 164, BLUES[0], BLUES[1])
        for row, key in enumerate(("width", "height", "aspect_ratio")):
            drawing.text(left, 178 + 30 * row, f"{key.replace('aspect_', '')}  {entry[key]:g}", INK, SMALL)
        left += max(w, 150) + 56
    drawing.text(GAP, 272, "the picture itself keeps its own size", DIM, SMALL)
    return drawing


@figure
def PixArtPrompt():
    text, style = "a lighthouse --ar 3:4", module("PixArtPrompt").STYLES
    style = next(name for name in style if "Cinematic" in name)
    positive, negative, ratio, _, _ = call("PixArtPrompt", prompt=text, style=style, negative_prompt="")
    _, width, height, _ = call("PixArtCanvas", resolution="1024", shape="1:1", width=1024, height=1024, batch_size=1,
                               ratio=ratio)
    drawing = Drawing(330)
    rows = [("prompt", text, ORANGE), ("style", style, ORANGE), ("positive", positive, INK),
            ("negative", negative, INK)]
    top = 14
    for name, value, colour in rows:
        drawing.text(GAP, top, name, DIM, SMALL)
        for line in wrapped(value, 46)[:3]:
            drawing.text(120, top, line, colour, SMALL)
            top += 26
        top += 6
    drawing.text(GAP, top, "ratio", DIM, SMALL)
    drawing.text(120, top, f"{ratio:g}", INK, SMALL)
    drawing.box(230, top, 230 + width / 10, top + height / 10, BLUES[0], BLUES[1])
    drawing.text(230 + width / 20, top + height / 20, f"{width} x {height}", INK, 18, "mm")
    drawing.image = drawing.image.crop((0, 0, drawing.image.width, round(2 * (top + height / 10 + GAP))))
    drawing.size = (WIDE, drawing.image.height // 2)
    return drawing


@figure
def PixArtCanvas():
    """All sizes of the 1024 table, to scale, from one corner."""
    drawing, scale, left, bottom = Drawing(580), 0.255, 30, 550
    table = buckets.TABLES[1024]
    for height, width in table.values():
        drawing.box(left, bottom - height * scale, left + width * scale, bottom, None, BLUES[0], 1.5)
    for across, down in ((1, 1), (16, 9), (4, 1), (1, 4)):
        _, height, width = buckets.nearest(table, down, across)
        right, top, words = left + width * scale, bottom - height * scale, f"{across}:{down}   {width} x {height}"
        drawing.box(left, top, right, bottom, None, ORANGE, 2.5)
        if across == 4:  # no room beside it
            drawing.text(right, bottom + 4, words, INK, SMALL, "ra")
        else:
            drawing.text(right + 8, top - 26, words, INK, SMALL)
    return drawing


def fluent(text: str, strength: float) -> Image.Image:
    """With the LoRA that comes along."""
    model, _ = call("PixArtLoraLoader", model=pixart_model(), lora_name="pixart_emoji_fluent.safetensors",
                    strength=strength, alpha=0.0)
    return pixart(text, model=model)


@figure
def PixArtLoraLoader():
    return Photo([(fluent("red apple", strength), f"strength {strength:g}") for strength in (-0.5, 0.0, 0.5, 1.0)])


@figure
def ComparePictures():
    a, b = (fluent("red apple", strength) for strength in (0.0, 1.0))
    row = []
    for share in (0.3, 0.7):
        both, at = b.copy(), round(share * a.width)
        both.paste(a.crop((0, 0, at, a.height)), (0, 0))
        ImageDraw.Draw(both).line((at, 0, at, a.height), ORANGE)
        row.append((both, f"slider at {share:.0%}"))
    return Photo([(a, "A: LoRA off"), *row, (b, "B: LoRA on")])


@figure
def PixArtSampler():
    def draw(algorithm, schedule, steps, eta=1.0):
        sampler, = call("PixArtSampler", algorithm=algorithm, order=2, eta=eta, inpaint="core")
        sigmas, = call("PixArtSigmas", model=pixart_model(), schedule=schedule, steps=steps, denoise=1.0, timestep=400)
        drawn = call("SamplerCustom", model=pixart_model(), add_noise=True, noise_seed=SEED, cfg=4.5,
                     positive=prompt("red apple"), negative=prompt(""), sampler=sampler, sigmas=sigmas,
                     latent_image=pixart_canvas())[0]
        return decoded(drawn)

    even = "reference (time-uniform)"
    return Photo([(draw("dpm-solver++", even, 20), "dpm-solver++"), (draw("sa-solver", even, 25, 0.0), "sa, eta 0"),
                  (draw("sa-solver", even, 25), "sa, eta 1"),
                  (draw("dpm-solver++", even, 4), "dpm, 4 steps")])


@figure
def PixArtSigmas():
    noise = pixart_model().get_model_object("model_sampling").diffusion.schedule
    rows = [("reference (time-uniform)", 20, 1.0), ("diffusers (linspace)", 20, 1.0), ("lcm", 4, 1.0),
            ("dmd (one step)", 1, 1.0), ("reference (time-uniform)", 20, 0.5)]
    drawing, left, right = Drawing(44 + 58 * len(rows)), 24, 616
    for row, (schedule, steps, denoise) in enumerate(rows):
        sigmas, = call("PixArtSigmas", model=pixart_model(), schedule=schedule, steps=steps, denoise=denoise,
                       timestep=400)
        timesteps = noise.timesteps(sigmas)[:-1]
        y = 42 + 58 * row
        words = f"{schedule}, {len(timesteps)} step" + "s" * (len(timesteps) > 1)
        drawing.text(left, y - 30, words + (f", denoise {denoise}" if denoise < 1 else ""), INK, SMALL)
        drawing.line((left, y + 6), (right, y + 6), colour=BLUES[0])
        for timestep in timesteps:
            drawing.dot(left + (right - left) * (999 - timestep) / 999, y + 6, ORANGE)
    drawing.text(left, drawing.size[1] - 28, "timestep 999, noise", DIM, SMALL)
    drawing.text(right, drawing.size[1] - 28, "0, picture", DIM, SMALL, "ra")
    return drawing


def pixart_controlnet():
    return call("PixArtControlNetLoader", control_net_name="pixart_emoji_hed.safetensors", dtype="default")[0]


def controlled(text: str, hint: Tensor, **how) -> Image.Image:
    settings = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, **how}
    positive, negative = call("PixArtControlNetApply", positive=prompt(text), negative=prompt(""), image=hint,
                              control_net=pixart_controlnet(), vae=vae("pixart_emoji_vae.safetensors"), **settings)
    return pixart(positive, negative, cfg=1.5)


@figure
def PixArtControlNetLoader():
    return Photo([one for text, name in (("cat face", "cat_face_hed"), ("mushroom", "mushroom_hed"))
                  for one in ((pictures(example(name))[0], name), (controlled(text, example(name)), text))])


@figure
def PixArtControlNetApply():
    hint, text = example("cat_face_hed"), "cat face"
    mask = torch.zeros(1, 128, 128)
    mask[:, :64] = 1
    return Photo([(pictures(hint)[0], "image"), (controlled(text, hint, strength=0.0), "strength 0"),
                  (controlled(text, hint), "strength 1"), (controlled(text, hint, mask=mask), "mask: upper half")])


def reference_canvas() -> dict:
    return call("PixArtReferenceCanvas", image=example("rose"), vae=vae("pixart_emoji_vae.safetensors"),
                resolution="256", shape="as the reference", fit="crop")[0]


@figure
def PixArtReferenceCanvas():
    latent = reference_canvas()
    canvas, mask = decoded(latent), latent["noise_mask"][0, 0]
    shown = hatched(canvas, mask)
    return Photo([(framed(canvas), "LATENT, decoded"), (shown, "its mask: what is drawn")])


def hatched(picture: Image.Image, mask: Tensor) -> Image.Image:
    """Stripes where a mask is 1."""
    stripes = Image.new("RGB", picture.size, BLUES[0])
    pen = ImageDraw.Draw(stripes)
    for x in range(-picture.height, picture.width, 16):
        pen.line((x, picture.height, x + picture.height, 0), BLUES[1], 5)
    where = gray(mask.float()).convert("L").resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(stripes, picture, where)


@figure
def PixArtRightHalf():
    canvas = torch.cat([example("rose"), example("mushroom")], dim=2)
    half, = call("PixArtRightHalf", image=canvas)
    drawing = Drawing(216)
    drawing.picture(pictures(canvas)[0], GAP, GAP, 300, 150)
    for y in range(GAP, GAP + 150, 12):
        drawing.line((GAP + 150, y), (GAP + 150, y + 6), colour=ORANGE, width=3)
    drawing.arrow((340, 87), (410, 87))
    drawing.picture(pictures(half)[0], 438, GAP, 150, 150)
    drawing.text(GAP, 174, "image", INK, SMALL)
    drawing.text(438, 174, "IMAGE", INK, SMALL)
    return drawing


@figure
def ConsistencyDecoderLoader():
    """Memory of a decode in fp16, as the node asks ComfyUI for it, beside what core asks for with the ordinary VAE."""
    need = module("ConsistencyDecoderLoader").consistency.BYTES_PER_PIXEL_AND_BYTE
    drawing, sides = Drawing(270), (256, 512, 768, 1024)
    drawing.text(GAP, 12, "memory of a decode in fp16", DIM, SMALL)
    for row, side in enumerate(sides):
        y, size = 52 + 52 * row, 2 * need * side**2 / 1e9
        drawing.text(GAP, y + 16, f"{side} x {side}", INK, SMALL, "lm")
        drawing.box(150, y, 150 + 24 * size, y + 32, ORANGE)
        drawing.text(162 + 24 * size, y + 16, f"{size:.1f} GB", INK, SMALL, "lm")
    return drawing
