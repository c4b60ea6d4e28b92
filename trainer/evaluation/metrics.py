"""What `python -m trainer evaluate` measures. Nothing is downloaded: a network is a file that the user names."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ...models_impl import state_dict
from ...models_impl.annotators import openpose
from ...models_impl.parsing import from_json

SUBSETS = 100  # of KID
PCK = 0.1  # of the longer side of the person's box
SIDE = 16  # of the pictures that retrieval compares


# --- Distances between two sets of features

def frechet(one: Tensor, other: Tensor) -> float:
    """Frechet distance between normal distributions with the moments of two sets of features, (N, C) and (M, C)
    (arXiv 1706.08500, equation 6). With fewer pictures than C it is too large; `kid` has no such bias."""
    (mean1, cov1), (mean2, cov2) = moments(one), moments(other)
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()  # trace of (cov1 cov2)^(1/2)
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    if len(features) < 2:
        raise ValueError(f"a distance between sets of pictures needs two pictures at least, got {len(features)}.")
    return features.double().mean(0), torch.cov(features.double().T)


def kid(one: Tensor, other: Tensor, size: int = 1000) -> tuple[float, float]:
    """(mean, standard deviation over subsets) of the unbiased squared maximum mean discrepancy with the kernel
    (x.y / C + 1)^3 (arXiv 1801.01401, section 4). A subset has half of the pictures at most: of whole sets the
    deviation would be none."""
    generator = torch.Generator().manual_seed(0)
    fewest = min(len(one), len(other))
    if fewest < 2:
        raise ValueError(f"a distance between sets of pictures needs two pictures at least, got {fewest}.")
    size = min(size, max(2, fewest // 2))
    found = []
    for _ in range(SUBSETS):
        x, y = (f[torch.randperm(len(f), generator=generator)[:size]].double() for f in (one, other))
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = sum((k.sum() - k.trace()) / (size * (size - 1)) for k in (xx, yy))
        found.append(within - 2 * xy.mean())
    found = torch.stack(found)
    return float(found.mean()), float(found.std())


def inception_score(probabilities: Tensor, splits: int = 10) -> tuple[float, float]:
    """(mean, standard deviation over splits) of exp(E KL(p(y|x) || p(y))), of (N, classes) (arXiv 1606.03498)."""
    p, scores = probabilities.double(), []
    for part in p.chunk(min(splits, len(p))):
        divergence = part * ((part + 1e-16).log() - (part.mean(0) + 1e-16).log())
        scores.append(divergence.sum(1).mean().exp())
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(correction=0))


# --- Features

def hed_features(net, pictures: Tensor) -> Tensor:
    """Means over the picture of the third block of HED's VGG16: (B, 3, H, W) in [0, 1] -> (B, 256). It was trained on
    ImageNet and then on edges, so distances on it are those of textures and shapes; they are no FID."""
    x = pictures * 255 - net.norm.to(pictures)
    for n in (1, 2, 3):
        if n > 1:
            x = F.max_pool2d(x, 2, ceil_mode=net.config.fused)
        x, _ = getattr(net, f"block{n}")(x)
    return x.mean((2, 3))


def inception(path: Path, device):
    """The TorchScript of Inception that StyleGAN and EDM use for FID (inception-2015-12-05.pt): the features of FID and
    the probabilities of the Inception Score."""
    try:
        net = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is no TorchScript file: take inception-2015-12-05.pt of StyleGAN3. "
                         f"({state_dict.first_line(error)})") from None
    return (lambda pictures: net(pictures, return_features=True).float(),
            lambda pictures: net(pictures, no_output_bias=True).float())


def clip_scores(folder: Path, device):
    """A function (pictures (B, 3, H, W) uint8, captions) -> (B,): 100 times the cosine, by any CLIP that transformers
    reads (arXiv 2104.08718 without its factor of 2.5)."""
    from ..libraries import LOCAL, hide_broken_torchvision

    hide_broken_torchvision()
    from transformers import AutoProcessor, CLIPModel

    try:
        net = CLIPModel.from_pretrained(folder, **LOCAL).to(device).eval()
        processor = AutoProcessor.from_pretrained(folder, **LOCAL, use_fast=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} cannot be read as a CLIP: {state_dict.first_line(error)}.") from None

    def score(pictures: Tensor, captions: list[str]) -> Tensor:
        images = [p.permute(1, 2, 0).numpy() for p in pictures.cpu()]
        given = processor(text=captions, images=images, return_tensors="pt", padding=True, truncation=True).to(device)
        out = net(given["input_ids"], given["pixel_values"], given["attention_mask"])
        return 100 * F.cosine_similarity(out.image_embeds, out.text_embeds).clamp(min=0).cpu()

    return score


def colours(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 3*SIDE*SIDE)"""
    return F.adaptive_avg_pool2d(pictures.float(), SIDE).flatten(1)


def ranks(generated: Tensor, references: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """(place of the true reference, 0 = nearest; index of the nearest one). Rows are features; truth: indices."""
    centre = references.mean(0)
    score = F.normalize(generated - centre, dim=1) @ F.normalize(references - centre, dim=1).T  # (B, R)
    own = score.gather(1, truth[:, None])
    return (score > own).sum(1), score.argmax(1)


# --- Does a picture follow its condition?

def edge_iou(one: Tensor, other: Tensor) -> Tensor:
    """Overlap of two edge maps (B, 1, H, W) in [0, 1], edges from 0.5 on: the share of edges that both have, of all
    that one has, (B,). An edge is common if the other map has one at most 1/256 of the short side away, at least a
    pixel. Two empty maps are alike (1)."""
    reach = max(1, round(min(one.shape[-2:]) / 256))
    a, b = (m >= 0.5 for m in (one, other))
    near_a, near_b = (F.max_pool2d(m.float(), 2 * reach + 1, 1, reach) > 0 for m in (a, b))
    common, either = (a & near_b) | (b & near_a), a | b
    found, total = (m.flatten(1).sum(1).cpu().double() for m in (common, either))
    return torch.where(total > 0, found / total.clamp(min=1), 1.0)


def people(path: Path) -> list[Tensor]:
    """The bodies of an OpenPose JSON (also ComfyUI's POSE_KEYPOINT): each (K, 3), x and y in the unit of the canvas,
    and how sure they are (0 = not seen)."""
    found = []
    for frame in openpose.plain(from_json(path.read_bytes(), str(path))):
        height, width = openpose.extent(frame, 1, 1)
        for person in frame["people"]:
            if points := person.get("pose_keypoints_2d"):
                found.append(torch.tensor(points).view(-1, 3) / torch.tensor([width, height, 1]))
    return found


def pck(found: list[Tensor], wanted: list[Tensor]) -> tuple[int, int]:
    """(joints that are right, joints wanted): within PCK of the longer side of the wanted person's box. Every
    wanted person is compared with the one found that fits best."""
    right = total = 0
    for person in wanted:
        seen = person[:, 2] > 0
        if not seen.any():
            continue
        points = person[seen, :2]
        reach = PCK * (points.amax(0) - points.amin(0)).max()
        fits = [int((((p[seen, :2] - points).norm(dim=1) <= reach) & (p[seen, 2] > 0)).sum()) for p in found
                if len(p) == len(person)]
        right, total = right + max(fits, default=0), total + int(seen.sum())
    return right, total
