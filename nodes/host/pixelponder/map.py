"""The patch map as a picture, which condition is selected where, in colours, with a legend; and for the browser."""
from __future__ import annotations

import base64
import io

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

COLOURS = (  # Okabe and Ito's, which colour-blind people can distinguish; repeated when there are more conditions
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167), (0, 114, 178),
    (255, 255, 255),
)  # fmt: skip
BACKGROUND = (24, 24, 24)
PREVIEW = 320  # pixels of the longer side, about
PICTURES = 8  # of a batch that the browser gets
TALLEST = 8192  # pixels of a picture of tiles, which browsers limit


def colours(conditions: int) -> Tensor:
    """Colours of the conditions, (K, 3) in [0, 1]."""
    return torch.tensor([COLOURS[k % len(COLOURS)] for k in range(conditions)]) / 255


def draw(share: Tensor, hints: list[Tensor], names: list[str], overlay: float, size: tuple[int, int] | None = None
         ) -> Tensor:
    """Each patch shows the hint of its condition, tinted; below, what the colours mean and how much each has.

    share: (B, K, rows, columns); hints: K times (1 or B, 3, H, W) in [0, 1]; overlay: 0 shows only the hints, 1 only
    the colours; size: (height, width) of the picture, at the top left, where patches reach beyond it. Returns
    (B, height + legend, width, 3) in [0, 1]. Patches without any condition are dark.
    """
    H, W = hints[0].shape[-2:]
    height, width = size or (H, W)
    B = max(len(share), *(len(hint) for hint in hints))
    share = rows(share, B)
    where = torch.stack(masks_of(share, H, W), dim=1)  # (B, K, H, W)
    shown = sum(where[:, k, None] * rows(hint, B) for k, hint in enumerate(hints))  # (B, 3, H, W)
    tint = torch.einsum("bkhw,kc->bchw", where, colours(len(hints)))
    pictures = ((1 - overlay) * shown + overlay * tint).movedim(1, -1)[:, :height, :width]
    legends = torch.stack([_legend(names, part.tolist(), width) for part in share.mean(dim=(2, 3))])
    return torch.cat((pictures, legends), dim=1)


def masks_of(share: Tensor, height: int, width: int) -> list[Tensor]:
    """share (B, K, rows, columns) -> K times (B, height, width), with sharp edges between patches."""
    return list(F.interpolate(share.float(), (height, width), mode="nearest").unbind(1))


def rows(x: Tensor, B: int) -> Tensor:
    """B rows, repeated in turn."""
    return x[torch.arange(B) % len(x)]


def preview(share: Tensor, names: list[str]) -> Image.Image:
    """The colours of only the first picture, small, with the legend."""
    share = share[:1]
    cell = max(1, PREVIEW // max(share.shape[-2:]))
    H, W = cell * share.shape[-2], cell * share.shape[-1]
    blank = [torch.zeros(1, 3, H, W)] * share.shape[1]
    picture = draw(share, blank, names, 1.0)[0]
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().numpy())


def tiles(share: Tensor) -> Tensor:
    """(S, K, rows, columns) uint8 -> (S rows, K columns, 4) in [0, 1]: white, as opaque as a condition's share of a
    patch is; a row of tiles for each step, a column for each condition."""
    S, K, rows, columns = share.shape
    alpha = share.permute(0, 2, 1, 3).reshape(S * rows, K * columns).float() / 255
    return torch.cat((torch.ones(*alpha.shape, 3), alpha[..., None]), dim=-1)


def as_data(share: Tensor) -> str:
    """The tiles of one step, share (K, rows, columns) in [0, 1], as an address that holds its picture."""
    alpha = (share * 255).round().byte().permute(1, 0, 2).flatten(1)
    picture = Image.fromarray(torch.stack((torch.full_like(alpha, 255), alpha), dim=-1).numpy())  # LA
    picture.save(file := io.BytesIO(), "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _legend(names: list[str], parts: list[float], width: int) -> Tensor:
    """(height, width, 3): a line for each condition."""
    line = max(14, min(28, width // 18))
    font = ImageFont.load_default(0.7 * line)
    image = Image.new("RGB", (width, line * len(names) + line // 2), BACKGROUND)
    pen = ImageDraw.Draw(image)
    for k, (name, part) in enumerate(zip(names, parts, strict=True)):
        top, box = line // 4 + k * line, int(0.7 * line)
        left = line // 4
        pen.rectangle((left, top + (line - box) // 2, left + box, top + (line + box) // 2),
                      fill=COLOURS[k % len(COLOURS)])
        pen.text((left + box + line // 3, top + line // 2), f"{name}  {part:.0%}", font=font, fill="white", anchor="lm")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).float() / 255
