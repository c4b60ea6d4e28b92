"""Hints of our ControlNets where other packs cut a picture into tiles, and where a prompt has an area of its own.

The packs (Ultimate SD Upscale, Tiled Diffusion, tiled samplers) take `control.cond_hint_original`, (B, C, H, W), and
either put a tile of it back, or leave a batch of tiles in the size that the network reads in `control.cond_hint`.
"""
from importlib import import_module

import pytest
import torch
from test_nodes_pixart import CONTROLNET, art, close, noise_of, run, sampler, sigmas, tokens  # noqa: F401
from test_nodes_pixart import draw as draw_art
from test_nodes_pixelponder import SIZE, apply, condition, draw, flux, hint  # noqa: F401
from test_nodes_pixelponder import noise_of as noise_of_flux
from test_nodes_ultrapixel import draw as draw_guided
from test_nodes_ultrapixel import guided, ultra  # noqa: F401

LARGE = 2 * 8 * SIZE[0], 2 * 8 * SIZE[1]  # pixels of a picture of which FLUX's latent here is a quarter


def corner(picture, axis=1):
    """The lower right quarter of a picture whose height is at `axis`."""
    H, W = picture.shape[axis:axis + 2]
    return picture.narrow(axis, H // 2, H - H // 2).narrow(axis + 1, W // 2, W - W // 2)


def with_tile(conditioning, change):
    """The conditioning with a copy of its control, changed as a pack does it."""
    (tokens, entries), = conditioning
    control = entries["control"].copy()
    change(control)
    return [[tokens, {**entries, "control": control}]]


def cropped(control):
    control.cond_hint_original = corner(control.cond_hint_original, axis=2)


# PixelPonder


def ponder(flux, image, masks=(None, None)):  # noqa: F811
    row = condition(flux, "depth", image=image, mask=masks[0])
    row = condition(flux, "canny", before=row, image=1 - image, mask=masks[1])
    return apply(flux, row)[0]


@pytest.mark.parametrize("masked", [False, True])
def test_pixelponder_reads_the_tile_that_was_cut_out_of_its_hint(flux, masked):  # noqa: F811
    image = hint(3, *LARGE)
    masks = torch.zeros(1, *LARGE), torch.ones(1, *LARGE)
    masks[0][:, :, 3 * LARGE[1] // 4 :], masks[1][:, :, 3 * LARGE[1] // 4 :] = 1, 0
    pair, tiles = (masks, [corner(mask) for mask in masks]) if masked else [(None, None)] * 2
    tile = draw(flux, with_tile(ponder(flux, image, pair), cropped))
    right = draw(flux, ponder(flux, corner(image), tiles))
    assert (tile - right).abs().max() < 1e-4
    assert (tile - draw(flux, ponder(flux, image, pair))).abs().max() > 1e-3


def test_pixelponder_reads_tiles_in_the_size_of_the_network(flux):  # noqa: F811
    image = hint(3, *LARGE)
    upscale = import_module("comfy.utils").common_upscale

    def tiles(control):
        whole = upscale(control.cond_hint_original, LARGE[1], LARGE[0], "nearest-exact", "center")
        control.cond_hint = torch.cat([corner(whole, axis=2), whole[..., : 8 * SIZE[0], : 8 * SIZE[1]]])

    noise = noise_of_flux(2)
    both = draw(flux, with_tile(ponder(flux, image), tiles), noise=noise)
    right = draw(flux, ponder(flux, torch.cat([corner(image), image[:, : 8 * SIZE[0], : 8 * SIZE[1]]])), noise=noise)
    assert (both - right).abs().max() < 1e-4


def test_a_hint_of_other_channels_is_refused(flux):  # noqa: F811
    def replaced(control):
        control.cond_hint_original = control.cond_hint_original[:, :3]

    with pytest.raises(ValueError, match="replaced PixelPonder's hint by a tensor of shape"):
        draw(flux, with_tile(ponder(flux, hint(3, *LARGE)), replaced))


def areas(conditioning, *boxes):
    """A prompt for each box (height, width, y, x) in cells, as Conditioning (Set Area) makes it."""
    return [[tokens, {**entries, "area": box, "set_area_to_bounds": False, "strength": 1.0}]
            for box in boxes for tokens, entries in conditioning]


def test_a_prompt_with_an_area_sees_its_part_of_pixelponder_s_hint(flux):  # noqa: F811
    """Two halves of a picture, each the picture of its own half: their border apart, which core blends."""
    image, H, W = hint(3, 8 * SIZE[0], 2 * 8 * SIZE[1]), *SIZE
    noise = noise_of_flux(1, (H, 2 * W))
    whole = draw(flux, areas(ponder(flux, image), (H, W, 0, 0), (H, W, 0, W)), noise=noise, steps=1)
    halves = [draw(flux, ponder(flux, part), noise=part_of_noise, steps=1)
              for part, part_of_noise in zip(image.chunk(2, dim=2), noise.chunk(2, dim=3), strict=True)]
    assert (whole - torch.cat(halves, dim=3)).abs().max() < 1e-4


def test_an_area_beyond_pixelponder_s_hint_is_refused(flux):  # noqa: F811
    H, W = SIZE
    with pytest.raises(ValueError, match="with areas, give it hints as large as the picture"):
        draw(flux, areas(ponder(flux, hint(3)), (H, W, 0, W)), noise=noise_of_flux(1, (H, 2 * W)))


# PixArt


def art_prompts(art, latent, mask=None):  # noqa: F811
    net = run(art, "ControlNetLoader", control_net_name=CONTROLNET, dtype="fp32")[0]
    return run(art, "ControlNetApply", positive=tokens(6), negative=tokens(3, 1), control_net=net, strength=1.0,
               start_percent=0.0, end_percent=1.0, latent={"samples": latent},
               **({} if mask is None else {"mask": mask}))


def art_picture(art, prompts, noise=None):  # noqa: F811
    model = art.alpha
    return draw_art(art, model, *prompts, sampler(art), sigmas(art, model), noise=noise)


@pytest.mark.parametrize("masked", [False, True])
def test_a_pixart_controlnet_reads_the_tile_that_was_cut_out_of_its_hint(art, masked):  # noqa: F811
    latent = noise_of(1, 4, 16, 24, seed=2)
    mask = torch.zeros(1, 16, 24)
    mask[..., 18:] = 1
    mask, tile = (mask, corner(mask)) if masked else (None, None)
    prompts = [with_tile(prompt, cropped) for prompt in art_prompts(art, latent, mask)]
    right = art_picture(art, art_prompts(art, corner(latent, axis=2), tile))
    close(art_picture(art, prompts), right)
    assert (right - art_picture(art, art_prompts(art, latent, mask))).abs().max() > 1e-3


def test_a_prompt_with_an_area_sees_its_part_of_a_pixart_controlnet_s_hint(art):  # noqa: F811
    latent, noise = noise_of(1, 4, 8, 24, seed=2), noise_of(1, 4, 8, 24)
    boxes = (8, 12, 0, 0), (8, 12, 0, 12)
    whole = art_picture(art, [areas(prompt, *boxes) for prompt in art_prompts(art, latent)], noise)
    halves = [art_picture(art, art_prompts(art, part), part_of_noise)
              for part, part_of_noise in zip(latent.chunk(2, dim=3), noise.chunk(2, dim=3), strict=True)]
    close(whole, torch.cat(halves, dim=3))


# UltraPixel


def test_ultrapixel_says_that_its_guide_cannot_be_drawn_in_tiles(ultra):  # noqa: F811
    model = guided(ultra)

    def in_tiles(apply_model, args):
        x = args["input"]
        left = apply_model(x[..., : x.shape[-1] // 2], args["timestep"], **args["c"])
        return torch.cat([left, left], dim=-1)[..., : x.shape[-1]]

    model.set_model_unet_function_wrapper(in_tiles)
    with pytest.raises(ValueError, match="is shown a tile"):
        draw_guided(ultra, model)
