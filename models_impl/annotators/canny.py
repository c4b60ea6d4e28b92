"""Canny edges, as ControlNets were trained on them.

`canny` is that of Stable Cascade's (CannyFilter in modules/controlnet.py of Stability-AI/StableCascade@7a7d341f, MIT);
`edges` that of PixelPonder's (src/flux/annotator/canny of chfyfr/PixelPonder). The detector is OpenCV's, or kornia's.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

RESIZE = 224
LIMIT = 1000


def canny(image: Tensor, low: float = 100, high: float = 200, resize: int | None = RESIZE) -> Tensor:
    """(B, 3, H, W) RGB in [0, 1] -> (B, 1, H, W) in [0, 1], float32 on the device of the image.

    low, high: thresholds of the gradient. resize: the side of the square, aspect ratio ignored, at which edges are
    detected before they are stretched back, as the released ControlNet was trained; None: at the picture's own size.
    """
    size, image = image.shape[-2:], image.float()
    if resize is not None:
        image = F.interpolate(image, size=(resize, resize), mode="bilinear")
    pixels = image.mul(255).permute(0, 2, 3, 1).to("cpu", torch.uint8).contiguous().numpy()  # cut, not rounded
    edges = _opencv(pixels, low, high)
    if resize is not None:
        edges = F.interpolate(edges, size=size, mode="bilinear")
    return edges.to(image.device)


def edges(image: Tensor, low: float = 100, high: float = 200, detector: str = "opencv") -> Tensor:
    """(B, 3, H, W) RGB in [0, 1] -> (B, 1, H, W) of 0 and 1.

    low, high: gradients, of pixels from 0 to 255, above which an edge continues and starts. detector: opencv looks at
    each channel of the picture; kornia at its brightness after a blur, for the whole batch at once, on its device.
    Raises ValueError for thresholds the wrong way round or above LIMIT.
    """
    if not 0 <= low <= high <= LIMIT:
        raise ValueError(f"low={low:g} must not be above high={high:g}, nor high above {LIMIT}: edges begin where the "
                         "gradient is above high and go on while it is above low.")
    if detector == "opencv":
        pixels = image.float().clamp(0, 1).mul(255).round().permute(0, 2, 3, 1).to("cpu", torch.uint8)
        return _opencv(pixels.contiguous().numpy(), low, high).to(image.device)
    try:
        from kornia.filters import canny as kornia_canny
    except ImportError as error:
        raise ImportError("Canny edges by kornia need the package kornia, which ComfyUI brings: pip install kornia. "
                          "The detector opencv does not need it.") from error
    most = 8 * 255  # of a gradient; kornia before 0.9 wants thresholds between 0 and 1, so the picture is scaled too
    graded = kornia_canny(image.float() / 8, *(max(1e-6, value / most) for value in (low, high)), hysteresis=False)[1]
    return _connected(graded)


def _connected(graded: Tensor) -> Tensor:
    """(B, 1, H, W) with 1 for strong edges and 0.5 for weak ones -> those connected to a strong one.

    kornia's own loop gives the same and takes three times as long on a CPU.
    """
    strong, weak = (graded == 1).float(), (graded > 0).float()
    while True:
        before = strong
        for _ in range(16):  # checking for the end is what costs on a GPU
            strong = F.max_pool2d(strong, 3, stride=1, padding=1) * weak
        if torch.equal(strong, before):
            return strong


def _opencv(pixels, low: float, high: float) -> Tensor:
    """pixels: (B, H, W, 3) of 0 to 255 in numpy -> (B, 1, H, W) of 0 and 1."""
    try:
        import cv2
    except ImportError as error:
        raise ImportError("Canny edges need OpenCV: pip install opencv-python-headless.") from error
    edges = torch.stack([torch.from_numpy(cv2.Canny(picture, low, high)) for picture in pixels])
    return edges[:, None].float().div_(255)
