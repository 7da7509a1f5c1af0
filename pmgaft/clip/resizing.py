"""The resize of `pmgaft.clip.preprocess` as a differentiable function, for attacks on the picture before it is resized.

Letters: n rows, H, W size of the pictures, h, w size of the model's input.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from pmgaft.clip.preprocess import Interpolation, PreprocessSpec, interpolation_of, scaled_size


def to_model_input(pixels: Tensor, spec: PreprocessSpec) -> Tensor:
    """Pictures of one size as the model sees them.

    pixels: float32 [n, 3, H, W] in [0, 1] -> float32 [n, 3, h, w] in [0, 1]. Equal to `to_pixels` but for Pillow's two
    roundings to 8 bits (one after each axis): at most 2/255 apart, about 0.3/255 on average.
    Where bicubic overshoots and is cut to [0, 1], the gradient passes as if it were not, so that a flat white wall is
    no wall for an attack.
    """
    rows, columns = _matrices(pixels.shape[-2], pixels.shape[-1], spec, pixels.device)
    resized = rows @ pixels @ columns.T
    return resized + (resized.clamp(0.0, 1.0) - resized).detach()


@lru_cache(maxsize=64)
def _matrices(height: int, width: int, spec: PreprocessSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """(float32 [h, H], float32 [w, W]): the resize is linear along each axis."""
    scaled_width, scaled_height = scaled_size((width, height), spec)
    kind = interpolation_of(spec)
    rows = _axis(height, scaled_height, spec.size[0], kind)
    columns = _axis(width, scaled_width, spec.size[1], kind)
    return rows.to(device), columns.to(device)


def _axis(size: int, scaled: int, wanted: int, kind: Interpolation) -> Tensor:
    """Resize `size` entries to `scaled`, then cut out the middle `wanted`, or put zeros around: [wanted, size].

    Pillow's filter: each output is the mean of the inputs under a kernel that is stretched by the shrinking factor.
    """
    stretch = max(size / scaled, 1.0)
    radius, kernel = _KERNELS[kind]
    if scaled >= wanted:
        first, place = round((scaled - wanted) / 2), 0
    else:
        first, place = 0, (wanted - scaled) // 2
    matrix = torch.zeros(wanted, size, dtype=torch.float64)
    for output in range(min(scaled, wanted)):
        centre = (first + output + 0.5) * size / scaled
        low, high = max(0, int(centre - radius * stretch + 0.5)), min(size, int(centre + radius * stretch + 0.5))
        weights = [kernel((position + 0.5 - centre) / stretch) for position in range(low, high)]
        matrix[place + output, low:high] = torch.tensor(weights, dtype=torch.float64) / math.fsum(weights)
    return matrix.float()


def _triangle(x: float) -> float:
    return max(0.0, 1 - abs(x))


def _cubic(x: float, a: float = -0.5) -> float:
    """Keys 1981, with Pillow's a."""
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


_KERNELS = {"bilinear": (1.0, _triangle), "bicubic": (2.0, _cubic)}
