"""A certificate by randomised smoothing: an l2 radius inside which the smoothed classifier's answer cannot change.

It is about the smoothed classifier, which answers what the model says most often under Gaussian noise, and about no
other; and it holds with a confidence. Source: Cohen, Rosenfeld and Kolter 2019 (arXiv 1902.02918), algorithm CERTIFY.
The noisy images' features do not depend on the labels: they are computed once and serve every label list.
Letters: n0 draws that choose the answer, n that count it, D features, K labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from pmgaft.errors import InputError
from pmgaft.probe.surface import Groups, leads_of

CONFIDENCE = 0.999


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisyFeatures:
    """One image's features under noise. selection: unit, [n0, D]; counting: [n, D], of other draws. sigma: standard
    deviation of the noise, pixel units. size: how many numbers an image has.
    """

    selection: Tensor
    counting: Tensor
    sigma: float
    seed: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """index: the smoothed classifier's answer, None where it abstains. count of draws gave it; p_low: lower confidence
    bound of its probability. radius_l2: pixel units, 0 where it abstains; radius_linf: what that implies. lists: how
    many label lists share the confidence.
    """

    index: int | None
    count: int
    draws: int
    p_low: float
    radius_l2: float
    radius_linf: float
    sigma: float
    confidence: float
    lists: int


def noisy_features(
    encode: Callable[[Tensor], Tensor],
    pixels: Tensor,
    *,
    sigma: float,
    selection: int = 100,
    draws: int = 1000,
    seed: int = 0,
    batch_size: int = 32,
) -> NoisyFeatures:
    """pixels: float32 [3, H, W] in [0, 1]; the noise is added to it, and not cut to [0, 1]. encode: [n, 3, H, W] ->
    unit features [n, D]. Raises: InputError for a sigma that is not above 0, or no draws.
    """
    if not (math.isfinite(sigma) and sigma > 0):
        raise InputError(f"sigma must be a positive number, not {sigma}", field="sigma", code="sigma_invalid")
    if selection < 1 or draws < 1:
        raise InputError("a certificate needs at least one draw of each kind", field="draws", code="draws_invalid")
    generator = torch.Generator().manual_seed(seed)
    parts = []
    with torch.no_grad():
        for first in range(0, selection + draws, batch_size):
            size = min(batch_size, selection + draws - first)
            noise = torch.randn(size, *pixels.shape, generator=generator).to(pixels.device)
            parts.append(encode(pixels + sigma * noise))
    features = torch.cat(parts)
    return NoisyFeatures(
        selection=features[:selection], counting=features[selection:], sigma=sigma, seed=seed, size=pixels.numel()
    )


def certify(
    noisy: NoisyFeatures, texts: Tensor, *, groups: Groups = (), confidence: float = CONFIDENCE, lists: int = 1
) -> Certificate:
    """texts: unit features of the labels, [K, D]. groups: labels that count as one answer. lists: how many label lists
    are tried on the same draws; the chance of a wrong certificate is shared out among them.
    """
    leads = torch.tensor(leads_of(groups, len(texts)), device=texts.device)
    chosen = leads[(noisy.selection @ texts.T).argmax(dim=1)]
    answer = int(torch.bincount(chosen, minlength=len(texts)).argmax())
    count = int((leads[(noisy.counting @ texts.T).argmax(dim=1)] == answer).sum())
    draws = len(noisy.counting)
    p_low = binomial_lower_bound(count, draws, (1 - confidence) / lists)
    holds = p_low > 0.5
    radius = noisy.sigma * NormalDist().inv_cdf(p_low) if holds else 0.0
    return Certificate(
        index=answer if holds else None,
        count=count,
        draws=draws,
        p_low=p_low,
        radius_l2=radius,
        radius_linf=radius / math.sqrt(noisy.size),
        sigma=noisy.sigma,
        confidence=confidence,
        lists=lists,
    )


def binomial_lower_bound(count: int, draws: int, error: float) -> float:
    """One-sided lower confidence bound of a probability of which `count` of `draws` were seen: the p at which so many
    or more are seen with probability `error`. Source: Clopper and Pearson 1934, the exact interval.
    """
    if count == 0:
        return 0.0
    seen = torch.arange(count, draws + 1, dtype=torch.float64)
    whole = torch.tensor(float(draws), dtype=torch.float64)
    ways = torch.lgamma(whole + 1) - torch.lgamma(seen + 1) - torch.lgamma(whole - seen + 1)

    def log_tail(p: float) -> float:
        return float((ways + seen * math.log(p) + (draws - seen) * math.log1p(-p)).logsumexp(dim=0))

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle < 1 and log_tail(middle) < math.log(error) else (low, middle)
    return low
