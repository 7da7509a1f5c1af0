"""The Square attack: random search with squares of noise, by the answers alone and without gradients.

It finds what gradients hide: where it beats the gradient attacks, those cannot be trusted.
Source: Andriushchenko, Croce, Flammarion and Hein 2020 (arXiv 1912.00049), algorithms 1 to 3, with the start of 0.8 for
the share of pixels that AutoAttack gives it (the source: 0.05 for linf, 0.1 for l2).
Letters: n rows, c channels, h w, s side of the square.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pmgaft.attacks.losses import Loss, Success
from pmgaft.attacks.noise import below, hashed_bits
from pmgaft.attacks.search import (
    Adversarial,
    Balls,
    Budget,
    Expired,
    LogitsOf,
    Search,
    as_pixels,
    check_pixels,
    float32_gradients,
    l2_norm,
)
from pmgaft.threat import Norm, ThreatModel

FIRST_SHARE = 0.8
"""Of the pixels, in the first squares."""

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After how many squares the share is halved, whatever the budget (source, section 3.1, for 10,000 queries)."""

_TINY = torch.finfo(torch.float32).tiny

_TILES = 5
"""Along each side, in the l2 start."""


def square(
    logits_of: LogitsOf,
    pixels: Tensor,
    loss: Loss,
    threats: Sequence[ThreatModel],
    budgets: Sequence[Budget],
    seeds: Sequence[int],
    *,
    success: Success | None = None,
    expired: Expired | None = None,
    starts: Tensor | None = None,
) -> Adversarial:
    """Adversarial images that raise `loss` inside each row's threat model, found without a gradient.

    Called and answering as `pgd`; `Budget.steps` are queries, forwards, of each restart, the start included, and
    gradients_used is 0. A few thousand are usual. Each row has its own squares. `starts` replaces the first restart's
    stripes (linf) or tiles (l2). Waits for the device once a query, to learn who leaves.
    """
    with float32_gradients(pixels.device), torch.no_grad():
        search = Search(logits_of, pixels, loss, success, threats, budgets, seeds, expired=expired, starts=starts)
        check_pixels(pixels)
        for restart in range(search.restarts):
            _run(search, restart, starts=starts if restart == 0 else None)
        return search.result()


def side(height: int, width: int, tried: int, norm: Norm) -> int:
    """Of the next square, in pixels, after `tried` squares. In l2 odd and at least 3 where the image has room, so that
    both halves of its pattern rise and fall."""
    share = FIRST_SHARE / 2 ** sum(tried > halving for halving in HALVINGS)
    length = max(round(math.sqrt(share * height * width)), 1)
    if norm == "l2":
        length = max(length | 1, 3)
    return min(length, height, width)


def _run(search: Search, restart: int, *, starts: Tensor | None) -> None:
    """One restart: keep a square where it raises the loss, else try another."""
    index = search.still_open(restart)
    balls, seeds, steps = search.balls[index], search.seeds[index], search.steps[index]
    best_loss = torch.full_like(index, -torch.inf, dtype=torch.float32)
    x = search.starting_points(restart)[index] if starts is not None else balls.project(_first(balls, seeds, restart))
    best = x
    for taken in range(1, int(steps.max()) + 1 if len(index) else 0):
        late = search.late(index)
        logits = search.logits(x, index)
        losses = search.losses(logits, index)
        leaves = search.judge(x, index, logits, losses, late=late, out_of_steps=steps <= taken)
        staying = len(leaves) - int(leaves.sum())
        if not staying:
            return
        better = losses > best_loss
        best, best_loss = torch.where(as_pixels(better), x, best), torch.where(better, losses, best_loss)
        if staying < len(leaves):
            places = (~leaves).nonzero()[:, 0]
            index, balls, seeds, steps = index[places], balls[places], seeds[places], steps[places]
            best, best_loss = best[places], best_loss[places]
        x = balls.project(_with_square(balls, best, seeds, restart, taken))


def _first(balls: Balls, seeds: Tensor, restart: int) -> Tensor:
    """Vertical stripes of +-eps for linf, tiles of bump pairs for l2: [n, c, h, w]."""
    origin = balls.origin
    channels, height, width = origin.shape[1:]
    signs = _signs(hashed_bits(seeds, _stream(restart, 0), channels * width)).reshape(-1, channels, 1, width)
    stripes = origin + balls.eps * signs
    if balls.l2 is None:
        return stripes
    tile = max(min(height, width) // _TILES, 1)
    rows, columns = height // tile, width // tile
    bumps = bump_pair(tile, origin.device).repeat(rows, columns)
    signs = _signs(hashed_bits(seeds, _stream(restart, 0), channels * rows * columns))
    signs = signs.reshape(-1, channels, rows, columns).repeat_interleave(tile, 2).repeat_interleave(tile, 3)
    down, right = (height - rows * tile) // 2, (width - columns * tile) // 2
    tiles = torch.zeros_like(origin)
    tiles[:, :, down : down + rows * tile, right : right + columns * tile] = signs * bumps
    return torch.where(balls.l2, origin + balls.eps * tiles / l2_norm(tiles), stripes)


def _with_square(balls: Balls, best: Tensor, seeds: Tensor, restart: int, taken: int) -> Tensor:
    """The best points so far with one more square each, not yet projected: [n, c, h, w]."""
    channels, height, width = best.shape[1:]
    bits = hashed_bits(seeds, _stream(restart, taken), channels + 5)
    signs = _signs(bits[:, 5:])[:, :, None, None]
    linf_side, l2_side = (side(height, width, taken - 1, norm) for norm in ("linf", "l2"))
    _, inside = _window(bits[:, 0:2], linf_side, height, width)
    stronger = torch.where(inside, best + 2 * balls.eps * signs, best)
    if balls.l2 is None:
        return stronger
    places, first = _window(bits[:, 0:2], l2_side, height, width)
    _, second = _window(bits[:, 2:4], l2_side, height, width)
    pair = bump_pair(l2_side, best.device)
    bumps = torch.stack([pair, pair.T])[(bits[:, 4, None, None] > 0).long(), places[0], places[1]][:, None]
    return torch.where(
        balls.l2, balls.origin + _moved(best - balls.origin, balls.eps, signs * bumps, first, second), stronger
    )


def _moved(delta: Tensor, eps: Tensor, bumps: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """What the first window holds plus the bumps, scaled to the norm of both windows and what of eps is unused; the
    second is emptied. delta, bumps: [n, c, h, w]; first, second: bool [n, 1, h, w]. Source: algorithm 3."""

    def norm(values: Tensor) -> Tensor:
        per_channel: Tensor = torch.linalg.vector_norm(values, dim=(2, 3), keepdim=True)
        return per_channel

    unused = (eps**2 - l2_norm(delta) ** 2).clamp_min(0) / delta.shape[1]
    available = (norm(delta * (first | second)) ** 2 + unused).sqrt()
    held = delta * first
    direction = (bumps + held / norm(held).clamp_min(_TINY)) * first
    filled = direction * (available / norm(direction).clamp_min(_TINY))
    return torch.where(first, filled, torch.where(second, 0.0, delta))


def bump_pair(length: int, device: torch.device) -> Tensor:
    """A positive and a negative bump side by side, of unit l2 norm: [length, length]. Source: equation 2."""
    half = length // 2
    pair = torch.cat([_bump(length, half), -_bump(length, length - half)], dim=1)
    unit: Tensor = pair / torch.linalg.vector_norm(pair)
    return unit.to(device, non_blocking=True)


def _bump(height: int, width: int) -> Tensor:
    """Highest in the middle, falling with the distance in squares around it: [height, width], height >= width."""
    middle = height // 2
    levels = torch.tensor([1 / (middle + 1 - k) ** 2 for k in range(middle + 1)]).cumsum(0).flip(0)
    down, right = (torch.arange(height) - middle).abs(), (torch.arange(width) - width // 2).abs()
    return levels[torch.maximum(down[:, None], right[None, :])]


def _window(bits: Tensor, length: int, height: int, width: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """A square anywhere in the image, for each row. bits: int64 [n, 2]. Each pixel's place in the square, down int64
    [n, h, 1] and right [n, 1, w], cut to it, and whether it lies inside, bool [n, 1, h, w]."""
    down = torch.arange(height, device=bits.device) - below(height - length + 1, bits[:, :1])
    right = torch.arange(width, device=bits.device) - below(width - length + 1, bits[:, 1:])
    inside = ((down >= 0) & (down < length))[:, None, :, None] & ((right >= 0) & (right < length))[:, None, None, :]
    return (down.clamp(0, length - 1)[:, :, None], right.clamp(0, length - 1)[:, None, :]), inside


def _signs(bits: Tensor) -> Tensor:
    """-1 or 1, evenly."""
    return torch.where(bits < 0, -1.0, 1.0)


def _stream(restart: int, taken: int) -> int:
    """Keeps the random numbers of one query apart from all others' of the row."""
    return (restart << 32) + taken
