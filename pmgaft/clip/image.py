"""Pixels in [0, 1] -> unit features. Letters: B batch, D features, H, W image size.

Imports torch alone, so that a serving worker can use it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from pmgaft.errors import ModelError

Module = TypeVar("Module", bound=nn.Module)

_FEW_CONVOLUTIONS = 4


class PixelEncoder(nn.Module):
    """An image tower with its normalisation inside.

    tower: float32 [B, 3, H, W], normalised by `mean` and `std` -> raw features [B, D].
    size: (H, W), the model's input resolution.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, mean: Sequence[float], std: Sequence[float], size: tuple[int, int]) -> None:
        super().__init__()
        self.tower = tower
        self.size = size
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)

    def raw(self, pixels: Tensor) -> Tensor:
        """pixels: float32 [B, 3, H, W] in [0, 1] -> features [B, D] as the tower gives them, of any length."""
        features: Tensor = self.tower((pixels - self.mean) / self.std)
        return features

    def raw_with_tokens(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels as for `raw` -> (raw features [B, D], those of the L patches in the same space [B, L, D]).

        Raises: ModelError for a tower that is no vision transformer of open_clip, or one that pools with attention.
        """
        tower: Any = self.tower
        if not hasattr(tower, "class_embedding") or tower.attn_pool is not None:
            kind = type(tower).__name__
            raise ModelError(f"the image tower ({kind}) has no patch tokens in the feature space; take a ViT")
        found = tower.forward_intermediates(
            (pixels - self.mean) / self.std, indices=1, normalize_intermediates=True, output_fmt="NLC"
        )
        features: Tensor = found["image_features"]
        tokens: Tensor = found["image_intermediates"][0]
        return features, tokens if tower.proj is None else tokens @ tower.proj

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: float32 [B, 3, H, W] in [0, 1] -> features [B, D] of unit length."""
        return nn.functional.normalize(self.raw(pixels), dim=-1)


class FewSizes(nn.Module):
    """A tower that meets three batch sizes, 1, 16 and 128, channels first: larger batches are cut up, the rest is
    padded.

    On a GPU, cuDNN plans every convolution anew for each batch size it has not met: for a tower of fifty that takes
    seconds with channels last, a tenth of one with channels first. An attack whose rows leave as they break meets
    hundreds of sizes.
    """

    SIZES = (1, 16, 128)

    def __init__(self, tower: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D], the same as the tower's."""
        largest = self.SIZES[-1]
        return torch.cat([self._padded(images[at : at + largest]) for at in range(0, max(len(images), 1), largest)])

    def _padded(self, images: Tensor) -> Tensor:
        if not len(images):
            return self.tower(images)
        size = next(size for size in self.SIZES if size >= len(images))
        filled = torch.cat([images, images[:1].expand(size - len(images), -1, -1, -1)]).contiguous()
        features: Tensor = self.tower(filled)
        return features[: len(images)]


def few_sizes(encoder: PixelEncoder) -> PixelEncoder:
    """The same function of the same weights, meeting few batch sizes; a tower with a convolution or two, as vision
    transformers are, stays as it is.
    """
    if sum(isinstance(module, nn.Conv2d) for module in encoder.modules()) <= _FEW_CONVOLUTIONS:
        return encoder
    mean, std = encoder.mean.flatten().tolist(), encoder.std.flatten().tolist()
    return PixelEncoder(FewSizes(encoder.tower), mean, std, encoder.size).to(encoder.mean.device)


def freeze(module: Module) -> Module:
    """The same module, in eval mode and without parameter gradients."""
    module.eval()
    module.requires_grad_(False)
    return module


def frozen_copy(encoder: PixelEncoder) -> PixelEncoder:
    """A frozen copy that later training of `encoder` does not touch: the guide."""
    return freeze(copy.deepcopy(encoder))


def fold_batchnorm(encoder: PixelEncoder) -> PixelEncoder:
    """A copy of `encoder`, in eval mode, in which each convolution has absorbed the BatchNorm that follows it.

    The same function up to float rounding, and faster; an encoder without such pairs is merely copied.
    Raises: ModelError if the folded encoder computes something else (a tower that uses a convolution's output twice).
    """
    folded = copy.deepcopy(encoder).eval()
    height, width = encoder.size
    example = torch.linspace(0, 1, 3 * height * width, device=encoder.mean.device).view(1, 3, height, width)
    with torch.no_grad():
        before = folded(example)
        for convolution, name in convolution_batchnorm_pairs(folded, example):
            norm = folded.get_submodule(name)
            assert isinstance(norm, nn.BatchNorm2d)
            _absorb(convolution, norm)
            folded.set_submodule(name, _what_follows(norm))
        after = folded(example)
    if not torch.allclose(before, after, atol=1e-3):
        raise ModelError("BatchNorm layers of this tower cannot be folded: it uses a convolution's output twice")
    return folded


def convolution_batchnorm_pairs(encoder: PixelEncoder, example: Tensor) -> list[tuple[nn.Conv2d, str]]:
    """Every convolution with the name of the BatchNorm that follows it.

    example: float32 [1, 3, H, W], run through `encoder`: a BatchNorm belongs to the convolution whose very output it
    receives.
    """
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # the tensors are kept so that no id is used again
    pairs: list[tuple[nn.Conv2d, str]] = []
    names = {module: name for name, module in encoder.named_modules()}

    def note_output(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        outputs[id(output)] = (module, output)

    def note_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in outputs:
            pairs.append((outputs[id(inputs[0])][0], names[module]))

    handles = [m.register_forward_hook(note_output) for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    handles += [m.register_forward_pre_hook(note_input) for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    encoder(example)
    for handle in handles:
        handle.remove()
    return pairs


def _absorb(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )


def _what_follows(norm: nn.BatchNorm2d) -> nn.Module:
    """timm's BatchNormAct2d carries a dropout and an activation, which must stay."""
    rest = [getattr(norm, part) for part in ("drop", "act") if hasattr(norm, part)]
    return nn.Sequential(*rest) if rest else nn.Identity()
