"""The gate of an export: what was written must compute what was trained.

Features are compared at two batch sizes, neither of them the size that was traced with, on noise and smooth shapes and
on texts of several lengths; answers, on pictures with labels. A format that misses a tolerance is not written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pmgaft.clip.text import mean_over_templates, prompts
from pmgaft.errors import ParityError

from .bundle import DifferentiableEntry, Parity, Precision
from .runtime import CPU, Encode, machine
from .sample import TEXTS, Sample, sample_pixels

BATCHES = (1, 7)
FEATURE_TOLERANCE = 1e-4  # fp32, a component of a unit vector; float order alone stays near 1e-6
GRADIENT_TOLERANCE = 1e-2  # of the gradient's length; a lost path changes it by more
COST_POINTS = 0.5  # of clean accuracy that a format of lower precision may cost
_CERTAIN = 1.645  # standard errors: a loss is beyond doubt with 95 %
_CHUNK = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far image encoders of one precision may be from the original.

    difference: of any component of a feature; cosine, cosine_mean, top1_agreement: no lower than this. The lowest
    cosine of int8 has no bound: one picture in some hundreds lies where the float32 tower, too, hangs on a hair.
    """

    difference: float = float("inf")
    cosine: float = -1.0
    cosine_mean: float
    top1_agreement: float


TOLERANCES: dict[Precision, Tolerance] = {
    "float32": Tolerance(difference=FEATURE_TOLERANCE, cosine_mean=0.9999, top1_agreement=1.0),
    "float16": Tolerance(cosine=0.995, cosine_mean=0.999, top1_agreement=0.98),
    "int8": Tolerance(cosine_mean=0.98, top1_agreement=0.9),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The model being exported: what it was asked, and its eager answers.

    pixels, tokens: one batch for each size tried; image_features, text_features: theirs. classes: tokens of the
    sample's prompts, label by label, in chunks; class_features: unit, [K, D]; sample_features: of its pictures, [n, D].
    """

    pixels: tuple[Tensor, ...]
    tokens: tuple[Tensor, ...]
    image_features: tuple[Tensor, ...]
    text_features: tuple[Tensor, ...]
    sample: Sample
    classes: tuple[Tensor, ...]
    class_features: Tensor
    sample_features: Tensor


@torch.no_grad()
def reference(
    image: Encode, text: Encode, tokenize: Callable[[Sequence[str]], Tensor], size: tuple[int, int], sample: Sample
) -> Reference:
    """Ask the eager encoders what exported ones will be asked: the same on every call.

    tokenize: texts -> int64 [N, L] as the text encoder wants them.  size: (H, W) of the pixels.
    """
    pixels = tuple(sample_pixels(batch, size, seed=batch) for batch in BATCHES)
    tokens = tuple(tokenize(TEXTS[:batch]) for batch in BATCHES)
    texts = prompts(sample.class_names, sample.templates)
    classes = tuple(tokenize(texts[start : start + _CHUNK]) for start in range(0, len(texts), _CHUNK))
    return Reference(
        pixels=pixels,
        tokens=tokens,
        image_features=tuple(map(image, pixels)),
        text_features=tuple(map(text, tokens)),
        sample=sample,
        classes=classes,
        class_features=_class_features(text, classes, sample),
        sample_features=_in_chunks(image, sample.pixels),
    )


@torch.no_grad()
def measure(
    eager: Reference, image: Encode, text: Encode, *, images: int | None = None, device: torch.device = CPU
) -> Parity:
    """How far an exported pair of encoders is from the eager one.

    images: of the sample, spread evenly over it; None: all. device: that the encoders compute on.
    """
    image_difference = text_difference = 0.0
    for pixels, expected in zip(eager.pixels, eager.image_features, strict=True):
        image_difference = _worse(image_difference, _largest(image(pixels) - expected))
    for tokens, expected in zip(eager.tokens, eager.text_features, strict=True):
        text_difference = _worse(text_difference, _largest(text(tokens) - expected))
    whole = len(eager.sample.pixels)
    count = min(images or whole, whole)
    rows = torch.arange(count) * whole // count
    expected, found = eager.sample_features[rows], _in_chunks(image, eager.sample.pixels[rows])
    cosine = (expected * found).sum(dim=1)
    similarity = expected @ eager.class_features.T
    before = similarity.argmax(dim=1)
    after = (found @ _class_features(text, eager.classes, eager.sample).T).argmax(dim=1)
    short_of_best = similarity.amax(dim=1) - similarity.gather(1, after[:, None])[:, 0]
    right, still_right = _right(before, eager.sample, rows), _right(after, eager.sample, rows)
    return Parity(
        batches=BATCHES,
        image_difference=_worse(image_difference, _largest(found - expected)),
        text_difference=text_difference,
        cosine=float(cosine.min()),
        cosine_mean=float(cosine.mean()),
        sample=eager.sample.name,
        images=len(rows),
        top1_agreement=float((short_of_best <= FEATURE_TOLERANCE).double().mean()),
        accuracy=None if eager.sample.labels is None else float(right.double().mean()),
        lost=int((right & ~still_right).sum()),
        won=int((still_right & ~right).sum()),
        machine=machine(device),
    )


def measure_gradient(eager: Reference, traced: Encode, image: Encode, entry: str) -> DifferentiableEntry:
    """How far an exported image encoder's features and input gradient are from the eager ones.

    traced: the eager encoder that was exported, BatchNorm folded. The gradient is compared with this one's: rounding
    alone, folded or not, flips some ReLUs, which moves a gradient by percents.
    entry: the encoder's path in the bundle.
    """
    image_difference = gradient_difference = 0.0
    for pixels, eager_features in zip(eager.pixels, eager.image_features, strict=True):
        features, found = _features_and_gradient(image, pixels)
        _, expected = _features_and_gradient(traced, pixels)
        image_difference = _worse(image_difference, _largest(features - eager_features))
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


def enforce(name: str, precision: Precision, found: Parity) -> None:
    """Raise ParityError, with the figures, unless a format agrees with the eager model as its precision promises.

    A loss of clean accuracy counts if it is more than `COST_POINTS` beyond doubt: a small sample shows no half point.
    """
    allowed = TOLERANCES[precision]
    _within(f"{name}: image features", found.image_difference, allowed.difference)
    _within(f"{name}: text features", found.text_difference, FEATURE_TOLERANCE)
    _no_lower(f"{name}: the lowest cosine of image features", found.cosine, allowed.cosine)
    _no_lower(f"{name}: the mean cosine of image features", found.cosine_mean, allowed.cosine_mean)
    if not found.top1_agreement >= allowed.top1_agreement:
        least = "all" if allowed.top1_agreement == 1 else f"{allowed.top1_agreement:.0%}"
        raise ParityError(
            f"{name}: the best text is the same for {found.top1_agreement:.1%} of the images, not {least}"
        )
    if found.cost_points - _CERTAIN * found.cost_error_points > COST_POINTS:
        raise ParityError(
            f"{name} costs {found.cost_points:.1f} points of clean accuracy on {found.images} images of {found.sample} "
            f"(standard error {found.cost_error_points:.1f}); at most {COST_POINTS:g} is allowed"
        )


def enforce_gradient(found: DifferentiableEntry) -> None:
    """Raise ParityError, with the figures, unless probes may trust the differentiable encoder."""
    _within(f"{found.image}: image features", found.image_difference, FEATURE_TOLERANCE)
    _within(f"{found.image}: input gradient", found.gradient_difference, GRADIENT_TOLERANCE)


def _within(what: str, difference: float, tolerance: float) -> None:
    if not difference <= tolerance:  # so written that NaN is no agreement
        raise ParityError(f"{what}: {difference:.2g} away from the eager model; at most {tolerance:.2g} is allowed")


def _no_lower(what: str, cosine: float, least: float) -> None:
    if not cosine >= least:
        raise ParityError(f"{what} with the eager model's is {cosine:.4f}; at least {least:g} is asked")


def _class_features(text: Encode, classes: Sequence[Tensor], sample: Sample) -> Tensor:
    return mean_over_templates(torch.cat([text(tokens) for tokens in classes]), len(sample.templates))


def _in_chunks(image: Encode, pixels: Tensor) -> Tensor:
    return torch.cat([image(chunk) for chunk in torch.split(pixels, _CHUNK)])


def _right(answers: Tensor, sample: Sample, rows: Tensor) -> Tensor:
    """bool [n]; where there is no right answer, none is."""
    return torch.zeros_like(answers, dtype=torch.bool) if sample.labels is None else answers == sample.labels[rows]


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
