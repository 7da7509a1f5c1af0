"""AutoAttack, as its authors' package runs it: a second opinion that other people's numbers can be held against.

Source: Croce and Hein 2020 (arXiv 2003.01690), through the package pyautoattack (the extra `attacks`). "AutoAttack"
means different lists of attacks in different papers, so the list is part of every answer here.
"""

import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pmgaft.attacks.search import check_pixels, float32_gradients
from pmgaft.errors import InputError, ThreatError, quote
from pmgaft.threat import ThreatModel

NAMES = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
"""What the package offers, by its own names."""

_MOST_TARGETS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoAttacked:
    """What AutoAttack found on B images.

    pixels: float32 [B, 3, H, W]; the image itself where nothing was found or the clean answer was wrong already.
    success: bool [B], the answer to it is another class than the label. attacks: names of those that ran, in order;
    those after the last image fell did not. warnings: what the package says against trusting the result.
    """

    pixels: Tensor
    success: Tensor
    attacks: tuple[str, ...]
    warnings: tuple[str, ...]


def standard_attacks(classes: int) -> tuple[str, ...]:
    """AutoAttack's standard list where the classes allow it, four and more; else the nearest that they do.

    Three classes have no targeted ratio (apgd-dlr stands in for apgd-t), two no ratio and one target.
    Raises: ThreatError (attack_unavailable) for fewer than two.
    """
    if classes < 2:
        message = f"AutoAttack needs at least 2 classes, not {classes}: the answer cannot change"
        raise ThreatError(message, field="attack", code="attack_unavailable")
    return {
        2: ("apgd-ce", "fab", "square"),
        3: ("apgd-ce", "apgd-dlr", "fab-t", "square"),
    }.get(classes, ("apgd-ce", "apgd-t", "fab-t", "square"))


def autoattack(
    logits_of: Callable[[Tensor], Tensor],
    pixels: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    attacks: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int = 250,
) -> AutoAttacked:
    """Attack images until their answers change or the list is at its end.

    logits_of: pixels float32 [n, 3, H, W] -> logits [n, K], all of them finite: all images have the same classes.
    pixels: float32 [B, 3, H, W] in [0, 1]. labels: int64 [B]. attacks: from NAMES, with the package's settings for
    version "standard" (one restart, 100 steps, up to 9 targets, 5,000 queries of Square); None: `standard_attacks`.
    An image's result depends on its batch, since the package draws its noise batch by batch. The global random state
    is left as it was.
    Raises: InputError (extra_missing) without the package, InputError for pixels outside [0, 1]; ThreatError for
    attacks that it does not know or the classes do not allow; ValueError without images.
    """
    if not len(pixels):
        raise ValueError("AutoAttack needs at least one image")
    runner_class, state_class = _package()
    check_pixels(pixels)
    devices = [pixels.device] if pixels.device.type == "cuda" else []
    with float32_gradients(pixels.device), torch.random.fork_rng(devices), _tracing_kept(), _heard() as said:
        pixels = pixels.detach().float().clone()
        model = _Float32(logits_of)
        with torch.no_grad():
            classes = model(pixels[:1]).shape[1]
        names = standard_attacks(classes) if attacks is None else _checked(attacks, classes)
        norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
        runner = runner_class(
            model, norm=norm, eps=threat.eps, seed=seed, version="custom", attacks=list(names), device=pixels.device
        )
        runner.apgd.n_restarts = runner.fab.n_restarts = 1
        runner.apgd_targeted.n_target_classes = runner.fab.n_target_classes = min(_MOST_TARGETS, classes - 1)
        with tempfile.TemporaryDirectory() as folder:
            state = Path(folder) / "state.json"
            found, answers = runner.run_standard_evaluation(pixels, labels, batch_size=batch_size, state_path=state)
            ran = state_class.from_disk(state).run_attacks
    return AutoAttacked(
        pixels=found.detach(),
        success=answers != labels,
        attacks=tuple(name for name in names if name in ran),
        warnings=tuple(dict.fromkeys(said)),
    )


class _Float32(nn.Module):
    """The model as a module, its logits float32 whatever its own precision."""

    def __init__(self, logits_of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.logits_of = logits_of

    def forward(self, x: Tensor) -> Tensor:
        return self.logits_of(x).float()


def _checked(attacks: Sequence[str], classes: int) -> tuple[str, ...]:
    """The names, all known and possible."""
    least = {"apgd-dlr": 3, "apgd-t": 4}
    for name in attacks:
        if name not in NAMES:
            message = f"AutoAttack's attacks are {', '.join(NAMES)}; it has no {quote(name)}"
            raise ThreatError(message, field="attacks", code="attack_unavailable")
        if classes < least.get(name, 2):
            message = f"AutoAttack's {name} needs at least {least.get(name, 2)} classes, not {classes}"
            raise ThreatError(message, field="attacks", code="attack_unavailable")
    return tuple(attacks)


def _package() -> tuple[Any, Any]:
    """AutoAttack and the record of its progress, from the package."""
    try:
        from pyautoattack import AutoAttack
        from pyautoattack.state import EvaluationState
    except ImportError as error:
        raise InputError(
            "AutoAttack needs the package pyautoattack: pip install 'pmgaft[attacks]'", code="extra_missing"
        ) from error
    return AutoAttack, EvaluationState


@contextmanager
def _tracing_kept() -> Iterator[None]:
    """One of the package's checks switches the interpreter's tracing off, and with it debuggers and coverage."""
    trace = sys.gettrace()
    try:
        yield
    finally:
        sys.settrace(trace)


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What the package warns of, through its logger."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("auto-attack")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
