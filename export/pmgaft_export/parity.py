"""The gate of an export: what was written must compute what was trained.

Two batch sizes, neither of them the size that was traced with; pictures of noise and of smooth shapes; texts of
several lengths. A bundle that misses a tolerance is not written.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pmgaft.errors import ParityError

from .bundle import DifferentiableEntry, Parity

BATCHES = (1, 7)
TEXTS = (
    "cat",
    "a photo of a dog.",
    "toaster",
    "a blurry photo of a red bicycle",
    "a",
    "the Eiffel tower at night",
    "a bowl of fruit on a table",
)
FEATURE_TOLERANCE = 1e-4  # fp32, a component of a unit vector; float order alone stays near 1e-6
GRADIENT_TOLERANCE = 1e-2  # of the gradient's length; a lost path changes it by more

Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The model being exported, eager: its encoders, one batch of pixels and one of tokens for each size tried."""

    image: Encode
    text: Encode
    pixels: tuple[Tensor, ...]
    tokens: tuple[Tensor, ...]


def reference(
    image: Encode, text: Encode, tokenize: Callable[[Sequence[str]], Tensor], size: tuple[int, int]
) -> Reference:
    """The inputs on which exported and eager are compared: the same ones on every call.

    tokenize: texts -> int64 [N, L] as the text encoder wants them.  size: (H, W) of the pixels.
    """
    return Reference(
        image=image,
        text=text,
        pixels=tuple(sample_pixels(batch, size, seed=batch) for batch in BATCHES),
        tokens=tuple(tokenize(TEXTS[:batch]) for batch in BATCHES),
    )


def sample_pixels(batch: int, size: tuple[int, int], seed: int) -> Tensor:
    """Pixels float32 [B, 3, H, W] in [0, 1]: smooth colour shapes with noise on them, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    shapes = interpolate(torch.rand(batch, 3, 4, 4, generator=generator), size=size, mode="bilinear")
    return 0.7 * shapes + 0.3 * torch.rand(batch, 3, *size, generator=generator)


@torch.no_grad()
def measure(eager: Reference, image: Encode, text: Encode) -> Parity:
    """How far an exported pair of encoders is from the eager one."""
    labels, exported_labels = eager.text(eager.tokens[-1]), text(eager.tokens[-1])
    image_difference = text_difference = 0.0
    same = total = 0
    for pixels, tokens in zip(eager.pixels, eager.tokens, strict=True):
        expected, found = eager.image(pixels), image(pixels)
        image_difference = _worse(image_difference, _largest(found - expected))
        text_difference = _worse(text_difference, _largest(text(tokens) - eager.text(tokens)))
        similarity = expected @ labels.T
        chosen = (found @ exported_labels.T).argmax(dim=1, keepdim=True)
        short_of_best = similarity.amax(dim=1) - similarity.gather(1, chosen).squeeze(1)
        same += int((short_of_best <= FEATURE_TOLERANCE).sum())
        total += len(pixels)
    return Parity(
        batches=BATCHES,
        image_difference=image_difference,
        text_difference=text_difference,
        top1_agreement=same / total,
    )


def measure_gradient(eager: Reference, traced: Encode, image: Encode, entry: str) -> DifferentiableEntry:
    """How far an exported image encoder's features and input gradient are from the eager ones.

    traced: the eager encoder that was exported, BatchNorm folded. The gradient is compared with this one's: rounding
    alone, folded or not, flips some ReLUs, which moves a gradient by percents.
    entry: the encoder's path in the bundle.
    """
    image_difference = gradient_difference = 0.0
    for pixels in eager.pixels:
        features, found = _features_and_gradient(image, pixels)
        _, expected = _features_and_gradient(traced, pixels)
        with torch.no_grad():
            image_difference = _worse(image_difference, _largest(features - eager.image(pixels)))
        length = expected.flatten(1).norm(dim=1).clamp_min(torch.finfo(expected.dtype).tiny)
        gradient_difference = _worse(
            gradient_difference, float(((found - expected).flatten(1).norm(dim=1) / length).max())
        )
    return DifferentiableEntry(
        image=entry,
        batches=BATCHES,
        image_difference=image_difference,
        gradient_difference=gradient_difference,
    )


def enforce(name: str, found: Parity) -> None:
    """Raise ParityError, with the figures, unless a format agrees with the eager model."""
    _within(f"{name}: image features", found.image_difference, FEATURE_TOLERANCE)
    _within(f"{name}: text features", found.text_difference, FEATURE_TOLERANCE)
    if found.top1_agreement < 1:
        raise ParityError(f"{name}: the best text is the same for {found.top1_agreement:.1%} of the images, not all")


def enforce_gradient(found: DifferentiableEntry) -> None:
    """Raise ParityError, with the figures, unless probes may trust the differentiable encoder."""
    _within(f"{found.image}: image features", found.image_difference, FEATURE_TOLERANCE)
    _within(f"{found.image}: input gradient", found.gradient_difference, GRADIENT_TOLERANCE)


def _within(what: str, difference: float, tolerance: float) -> None:
    if not difference <= tolerance:  # so written that NaN is no agreement
        raise ParityError(f"{what}: {difference:.2g} away from the eager model; at most {tolerance:.2g} is allowed")


def _features_and_gradient(encode: Encode, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features [B, D], and the gradient [B, 3, H, W] of their product with one fixed direction."""
    with torch.enable_grad():
        leaf = pixels.clone().requires_grad_()
        features = encode(leaf)
        direction = torch.randn(features.shape[1], generator=torch.Generator().manual_seed(0))
        if not features.requires_grad:
            return features, torch.zeros_like(pixels)
        (gradient,) = torch.autograd.grad((features @ direction).sum(), leaf)
    return features.detach(), gradient


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def _worse(first: float, second: float) -> float:
    """The larger of two, where NaN is the largest."""
    return second if not second <= first else first
