"""Does an adversarial image still fool the model once it has been a file, or has been resized?"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pmgaft.threat import ThreatModel

JPEG_QUALITY = 90
RESIZED_BY = 4
"""Pixels, to a smaller and to a larger size and back."""

_GREY_LEVELS = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Survival:
    """What one treatment leaves. index: the label that the model answers then. flips: that is no longer the clean
    answer (for a targeted probe: is the target). distance: linf, of the treated from the clean image, pixel units.
    """

    name: str
    flips: bool
    index: int
    distance: float


def survivals(
    logits_of: Callable[[Tensor], Tensor], flips: Callable[[Tensor], bool], clean: Tensor, adversarial: Tensor
) -> tuple[Survival, ...]:
    """clean, adversarial: float32 [3, H, W] in [0, 1]. logits_of: [n, 3, H, W] -> [n, K], over labels. flips: whether
    logits [K] are what the attack wanted.
    """
    _, height, width = adversarial.shape
    picture = picture_of(adversarial)
    treated = {
        "rounded to 8 bits": rounded(adversarial),
        "saved as PNG": _through_file(picture, "PNG"),
        f"saved as JPEG, quality {JPEG_QUALITY}": _through_file(picture, "JPEG", quality=JPEG_QUALITY),
        f"resized by -{RESIZED_BY} pixels and back": _resized(picture, width - RESIZED_BY, height - RESIZED_BY),
        f"resized by +{RESIZED_BY} pixels and back": _resized(picture, width + RESIZED_BY, height + RESIZED_BY),
    }
    with torch.no_grad():
        logits = logits_of(torch.stack([one.to(adversarial.device) for one in treated.values()]))
    return tuple(
        Survival(
            name=name,
            flips=flips(row),
            index=int(row.argmax()),
            distance=float((image.to(clean.device) - clean).abs().max()),
        )
        for (name, image), row in zip(treated.items(), logits, strict=True)
    )


def surviving_pixels(
    logits_of: Callable[[Tensor], Tensor],
    flips: Callable[[Tensor], bool],
    clean: Tensor,
    adversarial: Tensor,
    threat: ThreatModel,
) -> tuple[Tensor, bool]:
    """The image on the grid of 8 bits that is to be saved, float32 [3, H, W], and whether it still flips the answer.

    Rounded to the nearest grey level; where that gives the answer back, rounded away from the clean image as far as the
    threat model allows; the nearest again where nothing helps. Within the ball, but for rounding of the clean image.
    """
    levels = (clean * _GREY_LEVELS).round()
    change = adversarial * _GREY_LEVELS - levels
    away = change.sign() * change.abs().sub(1e-3).ceil()
    if threat.norm == "linf":
        most = int(threat.eps * _GREY_LEVELS + 1e-3)
        away = away.clamp(-most, most)
    outward = ((levels + away) / _GREY_LEVELS).clamp(0, 1)
    candidates = [rounded(adversarial)]
    if threat.norm == "linf" or float((outward - clean).norm()) <= threat.eps:
        candidates.append(outward)
    with torch.no_grad():
        for candidate in candidates:
            if flips(logits_of(candidate[None])[0]):
                return candidate, True
    return candidates[0], False


def rounded(pixels: Tensor) -> Tensor:
    """To the nearest of 256 grey levels: float32, the same shape."""
    return (pixels * _GREY_LEVELS).round() / _GREY_LEVELS


def picture_of(pixels: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] -> RGB, rounded and not cut off."""
    levels = (pixels.detach().cpu() * _GREY_LEVELS).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def pixels_of(picture: Image.Image) -> Tensor:
    """RGB -> float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / _GREY_LEVELS


def difference_picture(clean: Tensor, adversarial: Tensor) -> tuple[Image.Image, float]:
    """What was changed, around middle grey and as much amplified as fits; and by how much. [3, H, W] each."""
    change = adversarial - clean
    largest = float(change.abs().max())
    factor = 0.5 / largest if largest else 1.0
    return picture_of((0.5 + factor * change).clamp(0, 1)), factor


def _through_file(picture: Image.Image, kind: str, **options: int) -> Tensor:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    with Image.open(buffer) as again:
        return pixels_of(again)


def _resized(picture: Image.Image, width: int, height: int) -> Tensor:
    there = picture.resize((max(1, width), max(1, height)), Image.Resampling.BICUBIC)
    return pixels_of(there.resize(picture.size, Image.Resampling.BICUBIC))
