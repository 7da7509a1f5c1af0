"""The resize of `pmgaft.clip.preprocess` as a differentiable function, for attacks on the picture before it is resized.

Letters: n rows, H, W size of the pictures, h, w size of the model's input.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from pmgaft.clip.preprocess import Interpolation, PreprocessSpec, interpolation_of, scaled_size


class Resize:
    """From pictures of one size to the model's input.

    Equal to `to_pixels` but for Pillow's two roundings to 8 bits (one after each axis): at most 2/255 apart, about
    0.3/255 on average. Pixels that the model never sees (beside the square that is cut out) are left off first, so that
    an attack spends nothing on them.
    """

    def __init__(self, height: int, width: int, spec: PreprocessSpec) -> None:
        scaled_width, scaled_height = scaled_size((width, height), spec)
        kind = interpolation_of(spec)
        rows, self._seen_rows = _seen(_axis(height, scaled_height, spec.size[0], kind))
        columns, self._seen_columns = _seen(_axis(width, scaled_width, spec.size[1], kind))
        self._matrices = {torch.device("cpu"): (rows, columns)}

    def seen(self, pixels: Tensor) -> Tensor:
        """The part of the pictures that has an influence: [..., H, W] -> [..., H', W']."""
        return pixels[..., self._seen_rows, self._seen_columns]

    def __call__(self, seen: Tensor) -> Tensor:
        """float32 [n, 3, H', W'] in [0, 1], as `seen` gives it -> float32 [n, 3, h, w] in [0, 1].

        Where bicubic overshoots and is cut to [0, 1], the gradient passes as if it were not, so that a flat white wall
        is no wall for an attack.
        """
        if seen.device not in self._matrices:
            cpu = self._matrices[torch.device("cpu")]
            self._matrices[seen.device] = cpu[0].to(seen.device), cpu[1].to(seen.device)
        rows, columns = self._matrices[seen.device]
        resized = rows @ seen @ columns.T
        return resized + (resized.clamp(0.0, 1.0) - resized).detach()


@lru_cache(maxsize=64)
def resize_for(height: int, width: int, spec: PreprocessSpec) -> Resize:
    """The resize of pictures of this size; the last ones asked for are kept."""
    return Resize(height, width, spec)


def _seen(matrix: Tensor) -> tuple[Tensor, slice]:
    """The columns of [wanted, size] between the first and the last that are not zero, and where they are."""
    used = matrix.any(dim=0).nonzero()[:, 0]
    where = slice(int(used[0]), int(used[-1]) + 1)
    return matrix[:, where].contiguous(), where


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
