"""The inverse of folding BatchNorm into convolutions: what was trained folded goes back into the original
architecture."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pmgaft.clip.image import PixelEncoder, convolution_batchnorm_pairs

_SMALLEST_SCALE = 1e-6
"""A channel that BatchNorm scales by less than this is not divided by it: its scale becomes 1 instead."""


@torch.no_grad()
def unfold_batchnorm(folded: PixelEncoder, original: PixelEncoder) -> PixelEncoder:
    """A copy of `original` that computes what `folded`, made from it by `fold_batchnorm` and trained since, computes
    now.

    The statistics stay the original's. With s = weight / sqrt(var + eps) of the original BatchNorm, its convolution
    gets the folded weight / s, and its bias becomes the folded bias + mean s: exact but for float32 rounding.
    """
    unfolded = copy.deepcopy(original).eval()
    example = torch.zeros(1, 3, *original.size, device=original.mean.device)
    pairs = convolution_batchnorm_pairs(unfolded, example)
    names = {module: name for name, module in unfolded.named_modules()}
    _copy_what_was_not_folded(folded, unfolded)
    for convolution, name in pairs:
        source = folded.get_submodule(names[convolution])
        norm = unfolded.get_submodule(name)
        assert isinstance(source, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        _separate(source, convolution, norm, original.get_submodule(names[convolution]))
    return unfolded


def _copy_what_was_not_folded(folded: nn.Module, unfolded: nn.Module) -> None:
    trained = folded.state_dict()
    for name, value in unfolded.state_dict().items():
        if name in trained:
            value.copy_(trained[name])


def _separate(source: nn.Conv2d, convolution: nn.Conv2d, norm: nn.BatchNorm2d, before: nn.Module) -> None:
    assert isinstance(before, nn.Conv2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert source.bias is not None
    mean, deviation = norm.running_mean.double(), (norm.running_var.double() + norm.eps).sqrt()
    dead = (norm.weight.double() / deviation).abs() < _SMALLEST_SCALE
    norm.weight.copy_(torch.where(dead, deviation, norm.weight.double()))
    scale = norm.weight.double() / deviation
    convolution.weight.copy_(source.weight.double() / scale.reshape(-1, 1, 1, 1))
    own_bias = _bias(before, scale)
    if convolution.bias is not None:
        convolution.bias.copy_(own_bias)
    norm.bias.copy_(source.bias.double() + (mean - own_bias) * scale)


def _bias(convolution: nn.Conv2d, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if convolution.bias is None else convolution.bias.double()
