"""What a model answers to images, clean and attacked.

Letters: B batch, K classes, n images, E balls (eps), A attacks.

Clean accuracy: share of all images answered rightly. Robust accuracy: share of *all* images that are answered rightly
when clean and still are after every attack; an image answered wrongly when clean counts as not robust and is not
attacked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pmgaft.attacks.autoattack import autoattack
from pmgaft.attacks.menu import ATTACKS
from pmgaft.clip.image import PixelEncoder, few_sizes, fold_batchnorm, freeze
from pmgaft.clip.products import as_products
from pmgaft.evaluation.protocol import AUTOATTACK, NamedAttack, Protocol
from pmgaft.threat import ThreatModel

LogitsOf = Callable[[Tensor], Tensor]
"""pixels float32 [n, 3, H, W] in [0, 1] -> logits [n, K], each row by itself."""

Tell = Callable[[str], None]
"""Told what is going on, in a few words."""

NOT_RUN, BROKE, STOOD = -1, 0, 1

_BALL_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """One entry per image, in the order judged, on the CPU.

    index: int64 [n], the image's number in its set. label, clean: int64 [n], classes.
    adversarial: int64 [n, E], the answer to the adversarial image, computed anew from it; the label or the clean answer
    where none was found. stood: int8 [n, E, A]: STOOD or BROKE where this attack was run in this ball, else NOT_RUN.
    finite: bool [n], false where logits, or the attack's losses and gradients, were NaN or infinite. inside: bool [n],
    false where an attack returned a point outside its ball or [0, 1], which then does not count.
    zero_gradient_share: float32 [n], the largest of its attacks. gradients, forwards: int64 [n], spent on it.
    """

    index: Tensor
    label: Tensor
    clean: Tensor
    adversarial: Tensor
    stood: Tensor
    finite: Tensor
    inside: Tensor
    zero_gradient_share: Tensor
    gradients: Tensor
    forwards: Tensor

    @classmethod
    def joined(cls, parts: Iterable[Outcomes]) -> Outcomes:
        """Several batches as one."""
        parts = list(parts)
        return cls(**{name: torch.cat([getattr(p, name) for p in parts]) for name in cls.__dataclass_fields__})

    def rows(self, chosen: Tensor) -> Outcomes:
        """Some images. chosen: bool [n] or positions."""
        return Outcomes(**{name: getattr(self, name)[chosen] for name in self.__dataclass_fields__})

    @property
    def right(self) -> Tensor:
        """Answered rightly when clean: bool [n]."""
        return torch.eq(self.clean, self.label)

    @property
    def robust(self) -> Tensor:
        """Right when clean, and in every ball up to this one after every attack: bool [n, E]."""
        return self.right[:, None] & ~self._broken_within()

    def standing_after(self, ball: int, attack: int) -> Tensor:
        """Right after everything in the smaller balls, and after this and all earlier attacks in this one: bool [n]."""
        before = self.robust[:, ball - 1] if ball else self.right
        return before & ~(self.stood[:, ball, : attack + 1] == BROKE).any(dim=1)

    def standing_alone(self, ball: int, attack: int) -> Tensor | None:
        """Right after this one attack: bool [n]; None unless it was run on every image that is right when clean."""
        verdicts = self.stood[:, ball, attack]
        return None if bool((verdicts[self.right] == NOT_RUN).any()) else verdicts == STOOD

    def broken_by(self, ball: int) -> Tensor:
        """int64 [n]: the first attack that broke the image in this or a smaller ball; -1 where none did."""
        flat = (self.stood[:, : ball + 1] == BROKE).flatten(1)
        if not flat.shape[1]:
            return torch.full((len(self),), -1)
        first = flat.int().argmax(dim=1) % self.stood.shape[2]
        return torch.where(flat.any(dim=1), first, -1)

    def __len__(self) -> int:
        return len(self.label)

    def _broken_within(self) -> Tensor:
        return (self.stood == BROKE).any(dim=2).cumsum(dim=1) > 0


def judge(
    encoder: PixelEncoder,
    texts: Tensor,
    scale: float,
    batches: Iterable[tuple[Tensor, Tensor]],
    protocol: Protocol,
    *,
    indices: Sequence[int] | None = None,
) -> Outcomes:
    """Answers of one encoder to one set, model-input grid.

    texts: unit features of the classes, float32 [K, D], K at least 2. batches: (pixels float32 [B, 3, H, W] in [0, 1],
    labels int64 [B]), on the encoder's device. indices: the images' numbers in their set, in the order of the batches;
    None: 0, 1, 2 and so on.
    """
    logits_of = attack_surface(encoder, texts, scale)
    parts: list[Outcomes] = []
    done = 0
    for pixels, labels in batches:
        following = range(done, done + len(labels))
        numbers = [n if indices is None else indices[n] for n in following]
        parts.append(judge_images(logits_of, pixels, labels, numbers, protocol, len(labels)))
        done += len(labels)
    return Outcomes.joined(parts)


def attack_surface(
    encoder: PixelEncoder, texts: Tensor, scale: float, resize: Callable[[Tensor], Tensor] | None = None
) -> LogitsOf:
    """Pixels to logits; with `resize`, from the pictures before they are resized."""

    def logits_of(pixels: Tensor) -> Tensor:
        features: Tensor = encoder(pixels if resize is None else resize(pixels))
        return scale * features @ texts.T

    return logits_of


def attackable(encoder: PixelEncoder) -> PixelEncoder:
    """A frozen copy that computes the same and is quick to differentiate: folded, as products, nothing in place;
    channels last, or on a GPU in few batch sizes, since rows leave an attack as they break.
    """
    quick = as_products(nothing_in_place(freeze(fold_batchnorm(encoder))))
    return few_sizes(quick) if encoder.mean.is_cuda else quick.to(memory_format=torch.channels_last)


def nothing_in_place(encoder: PixelEncoder) -> PixelEncoder:
    """The same encoder, its activations out of place: in place they copy their input first wherever autograd is on."""
    for module in encoder.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
    return encoder


def judge_images(
    logits_of: LogitsOf,
    pixels: Tensor,
    labels: Tensor,
    numbers: Sequence[int],
    protocol: Protocol,
    batch_size: int,
    *,
    device: torch.device | None = None,
    tell: Tell | None = None,
) -> Outcomes:
    """Clean answers, then attack by attack in ball by ball; before each, all that still stands is batched anew, so that
    few survivors run together and not each in the batch it came from.

    pixels: float32 [n, 3, H, W]; labels: int64 [n]; numbers: the images' numbers in their set. device: where batches
    are moved to be worked on; None: where pixels are.
    """
    device = device or pixels.device
    labels = labels.to(device)
    clean_logits = torch.cat([_logits(logits_of, part.to(device)) for part in torch.split(pixels, batch_size)])
    clean = clean_logits.argmax(dim=1)
    right, answer = clean == labels, clean.clone()
    size, balls, attacks = len(labels), len(protocol.threats), len(protocol.attacks)
    adversarial = clean[:, None].repeat(1, balls)
    stood = torch.full((size, balls, attacks), NOT_RUN, dtype=torch.int8, device=device)
    finite, inside = clean_logits.isfinite().all(dim=1), torch.ones_like(right)
    zeros = torch.zeros(size, device=device)
    gradients, forwards = torch.zeros_like(labels), torch.ones_like(labels)
    standing = right.clone()
    for ball, threat in enumerate(protocol.threats):
        for place, attack in enumerate(protocol.attacks if threat.eps > 0 else ()):
            rows = (right if protocol.each_alone else standing).nonzero()[:, 0]
            for done, some in enumerate(torch.split(rows, batch_size) if len(rows) else ()):
                if tell:
                    tell(f"{attack.name} at {threat.to_json()['eps']}: {min(done * batch_size, len(rows))}/{len(rows)}")
                found = attack_rows(
                    logits_of,
                    pixels[some.to(pixels.device)].to(device),
                    labels[some],
                    clean_logits[some],
                    attack,
                    threat,
                    [protocol.seed + numbers[row] for row in some.tolist()],
                )
                answer[some] = torch.where(standing[some] & found.broke, found.answer, answer[some])
                standing[some] &= ~found.broke
                stood[some, ball, place] = torch.where(found.broke, BROKE, STOOD).to(torch.int8)
                finite[some] &= found.finite
                inside[some] &= found.inside
                zeros[some] = torch.maximum(zeros[some], found.zero_gradient_share)
                gradients[some] += found.gradients
                forwards[some] += found.forwards
        adversarial[:, ball] = answer
    return Outcomes(
        index=torch.tensor(numbers, dtype=torch.int64),
        label=labels.cpu(),
        clean=clean.cpu(),
        adversarial=adversarial.cpu(),
        stood=stood.cpu(),
        finite=finite.cpu(),
        inside=inside.cpu(),
        zero_gradient_share=zeros.cpu(),
        gradients=gradients.cpu(),
        forwards=forwards.cpu(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Attacked:
    """What one attack did to n rows. answer: int64 [n], to the image it returned; broke: bool [n]; the rest as in
    Outcomes.
    """

    answer: Tensor
    broke: Tensor
    finite: Tensor
    inside: Tensor
    zero_gradient_share: Tensor
    gradients: Tensor
    forwards: Tensor


def attack_rows(
    logits_of: LogitsOf,
    pixels: Tensor,
    labels: Tensor,
    clean_logits: Tensor,
    attack: NamedAttack,
    threat: ThreatModel,
    seeds: Sequence[int],
) -> Attacked:
    """One attack on one batch. What it claims is not believed: the answer is computed anew from the image it returned,
    which must lie in its ball and in [0, 1].
    """

    def surface(x: Tensor, rows: Tensor) -> Tensor:
        logits = logits_of(x)
        if x.requires_grad and not logits.requires_grad:
            # A model that is cut off from its pixels has the gradient zero, and the self-checks say what that means.
            logits = logits + 0 * x.flatten(1).sum(dim=1, keepdim=True)
        return logits

    if attack.name == AUTOATTACK:
        points = autoattack(logits_of, pixels, labels, threat, seed=seeds[0], batch_size=len(labels)).pixels
        finite, zeros = torch.ones_like(labels, dtype=torch.bool), torch.zeros(len(labels), device=labels.device)
        gradients = forwards = torch.zeros_like(labels)  # the package does not count them
    else:
        budgets, threats = [attack.budget] * len(labels), [threat] * len(labels)
        found = ATTACKS[attack.name](surface, pixels, labels, threats, budgets, seeds, clean_logits=clean_logits)
        points, finite, zeros = found.pixels, found.finite, found.zero_gradient_share
        gradients, forwards = found.gradients_used, found.forwards_used
    logits = _logits(logits_of, points)
    answer, real = logits.argmax(dim=1), logits.isfinite().all(dim=1)
    inside = inside_ball(points, pixels, threat)
    return Attacked(
        answer=answer,
        broke=(answer != labels) & real & inside,
        finite=finite & real,
        inside=inside,
        zero_gradient_share=zeros,
        gradients=gradients,
        forwards=forwards + 1,
    )


def inside_ball(points: Tensor, pixels: Tensor, threat: ThreatModel) -> Tensor:
    """bool [n]: within the ball around `pixels` and within [0, 1], up to float rounding."""
    delta = (points - pixels).flatten(1)
    if threat.norm == "linf":
        near = delta.abs().amax(dim=1) <= threat.eps + _BALL_TOLERANCE
    else:
        near = torch.linalg.vector_norm(delta, dim=1) <= threat.eps * (1 + 1e-5) + _BALL_TOLERANCE
    flat = points.flatten(1)
    return near & (flat.amin(dim=1) >= 0) & (flat.amax(dim=1) <= 1)


@torch.no_grad()
def _logits(logits_of: LogitsOf, pixels: Tensor) -> Tensor:
    return logits_of(pixels).float()
