"""Vision transformers, quicker to run and to differentiate: what torch computes in a roundabout way becomes a plain
product of matrices.

Letters: B batch, C channels in, D channels out, H, W image size, S patch size.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

SMALLEST_PATCH = 8
"""Smaller kernels are those of convolutional towers, which torch's own convolutions suit."""


class PatchProduct(nn.Conv2d):
    """A convolution whose kernels touch each other and do not overlap, as one product of all patches with all kernels.

    The same parameters and the same function up to float rounding; on a CPU far quicker to differentiate.
    """

    @classmethod
    def of(cls, convolution: nn.Conv2d) -> PatchProduct:
        """The same convolution, of the same parameters."""
        with torch.device("meta"):
            product = cls(
                convolution.in_channels,
                convolution.out_channels,
                kernel_size=convolution.kernel_size,  # type: ignore[arg-type]
                stride=convolution.stride,  # type: ignore[arg-type]
                bias=convolution.bias is not None,
            )
        product.weight, product.bias = convolution.weight, convolution.bias
        return product.train(convolution.training)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, H // S, W // S]."""
        size = self.kernel_size[0]
        batch, channels, *extent = images.shape
        height, width = (length // size for length in extent)
        whole = images[:, :, : height * size, : width * size]
        patches = whole.reshape(batch, channels, height, size, width, size).permute(0, 2, 4, 3, 5, 1)
        kernels = self.weight.permute(0, 2, 3, 1)  # as they lie in memory with channels last: nothing is copied
        return nn.functional.linear(patches.flatten(3), kernels.flatten(1), self.bias).permute(0, 3, 1, 2)


def as_products(module: Module) -> Module:
    """The same module, changed in place: its parameters keep their names, its function is the same up to rounding.

    Patches are cut by a product (`PatchProduct`), and open_clip's transformers run with the sequence first: attention
    reads its input so, and on a CPU torch multiplies more slowly what lies in memory in another order.
    """
    for name, part in list(module.named_modules()):
        if type(part) is nn.Conv2d and _cuts_patches(part):
            module.set_submodule(name, PatchProduct.of(part))
        elif _runs_batch_first(part):
            part.batch_first = False
            for block in part.resblocks:
                block.attn.batch_first = False
    return module


def _cuts_patches(convolution: nn.Conv2d) -> bool:
    size = convolution.kernel_size
    touching = size == convolution.stride and convolution.padding in ((0, 0), "valid")
    plain = (convolution.groups, *convolution.dilation) == (1, 1, 1)
    return touching and plain and size[0] == size[1] >= SMALLEST_PATCH


def _runs_batch_first(module: Any) -> bool:
    """Whether this is open_clip's plain transformer, as it comes."""
    blocks = getattr(module, "resblocks", None)
    return (
        getattr(module, "batch_first", False) is True
        and isinstance(blocks, nn.ModuleList)
        and all(isinstance(getattr(block, "attn", None), nn.MultiheadAttention) for block in blocks)
    )
