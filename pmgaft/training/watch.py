"""Notices a loss that is no longer finite, without making the host wait for the device step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pmgaft.errors import PmgaftError
from pmgaft.training.step import Measured


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    step: int
    measured: Measured
    norm: Tensor
    finite: Tensor
    arrived: torch.cuda.Event | None


class Watch:
    """Looks at every step's loss and gradient.

    On a CPU before the update; on a GPU a step later, while the next one is under way. `settle` before anything is kept
    of the weights. advice: what to do next, asked for when something is wrong.
    """

    def __init__(self, advice: Callable[[], str]) -> None:
        self._advice = advice
        self._pending: _Look | None = None

    def look(self, step: int, measured: Measured, norm: Tensor) -> None:
        """norm: the gradient's, a scalar. Raises: PmgaftError as `settle` does."""
        finite, arrived = measured.values[0].isfinite() & norm.isfinite(), None
        if finite.is_cuda:
            finite = finite.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
            self.settle()
        self._pending = _Look(step=step, measured=measured, norm=norm, finite=finite, arrived=arrived)
        if arrived is None:
            self.settle()

    def settle(self) -> None:
        """Wait for the last look. Raises: PmgaftError naming step, terms and what to go on from."""
        look, self._pending = self._pending, None
        if look is None:
            return
        if look.arrived is not None:
            look.arrived.synchronize()
        if bool(look.finite):
            return
        seen = look.measured.figures()
        terms = ", ".join(f"{name} {seen[name]:.4g}" for name in look.measured.names if name.startswith("loss"))
        raise PmgaftError(
            f"step {look.step}: the loss or its gradient is no longer finite ({terms}, gradient norm "
            f"{float(look.norm):.4g}); lower lr, or lengthen warmup or attack.ramp, and {self._advice()}"
        )
