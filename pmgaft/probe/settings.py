"""What a probe is asked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pmgaft.attacks import Budget
from pmgaft.errors import ThreatError, quote
from pmgaft.probe.surface import Groups
from pmgaft.threat import Norm, ThreatModel, format_eps

Algorithm = Literal["pgd", "apgd"]
LossName = Literal["ce", "margin", "dlr"]

APGD_FROM_STEPS = 50
"""Auto-PGD needs room to set its own steps; with fewer steps plain PGD finds more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSettings:
    """The threat model of one probe, what may be spent on it, and what else is asked.

    steps and restarts are per loss: the losses are climbed one after the other while the answer stands, each with at
    most steps x restarts gradients. losses: "ce", the log odds; "margin", to the nearest rival; "dlr", from three
    answers on (four for a targeted probe), free of the logits' scale. With two answers all are one, and one is climbed.
    algorithm: None is "apgd" from 50 steps on, else "pgd". step_size: pixel units; None is 2.5 eps / steps for pgd and
    2 eps at first for apgd. seconds: of wall time for everything together, None for no limit.
    target: the label, by position, that the answer must become; None: any other. groups: labels that count as one
    answer, by positions; a change inside a group is no change.
    min_eps: also search the smallest eps that changes the answer. targets: so many of the likeliest other answers get
    such a search of their own. search_gradients: at most, of each search. resolution: how near, relatively, a search
    ends below what it found. health: also check the attack itself, by other eps and, with square_queries above 0, by
    an attack without gradients.
    Raises: ThreatError for what makes no sense.
    """

    threat: ThreatModel
    steps: int = 20
    restarts: int = 1
    step_size: float | None = None
    seed: int = 0
    seconds: float | None = None
    algorithm: Algorithm | None = None
    losses: tuple[LossName, ...] = ("ce", "margin")
    target: int | None = None
    groups: Groups = ()
    min_eps: bool = False
    targets: int = 0
    search_gradients: int = 100
    resolution: float = 0.02
    health: bool = False
    square_queries: int = 0

    def __post_init__(self) -> None:
        """Refuse what no attack could mean."""
        self.budget()
        _one_of("algorithm", self.algorithm, (None, *get_args(Algorithm)))
        for loss in self.losses:
            _one_of("loss", loss, get_args(LossName))
        if not self.losses:
            raise ThreatError("a probe needs at least one loss", field="losses", code="loss_invalid")
        for name, least in (("targets", 0), ("search_gradients", 2), ("square_queries", 0)):
            if getattr(self, name) < least:
                message = f"{name} must be at least {least}, not {getattr(self, name)}"
                raise ThreatError(message, field=name, code=f"{name}_invalid")
        if not 0 < self.resolution < 1:
            message = f"resolution must lie between 0 and 1, not {self.resolution}"
            raise ThreatError(message, field="resolution", code="resolution_invalid")
        inside = [position for group in self.groups for position in group]
        if len(set(inside)) < len(inside) or any(position < 0 for position in inside):
            raise ThreatError("a label can be in one group only, and once", field="groups", code="groups_invalid")

    def budget(self) -> Budget:
        """As the attack takes it."""
        return Budget(steps=self.steps, step_size=self.step_size, restarts=self.restarts)

    @property
    def used_algorithm(self) -> Algorithm:
        """What `algorithm` comes to."""
        return self.algorithm or ("apgd" if self.steps >= APGD_FROM_STEPS else "pgd")

    @property
    def used_step_size(self) -> float:
        """In pixel units; of apgd, the first."""
        if self.step_size is None and self.used_algorithm == "apgd":
            return 2 * self.threat.eps
        return self.budget().step_for(self.threat.eps)

    def to_json(self) -> dict[str, Any]:
        """The whole threat model, for reports."""
        return {
            **self.threat.to_json(),
            "attack": self.used_algorithm,
            "losses": list(self.losses),
            "steps": self.steps,
            "restarts": self.restarts,
            "step_size": eps_text(self.used_step_size, self.threat.norm),
            "target": self.target,
            "groups": [list(group) for group in self.groups],
            "precision": "float32",
            "seed": self.seed,
            "seconds": self.seconds,
        }


def eps_text(eps: float, norm: Norm = "linf") -> str:
    """Short, for reading: "0.73/255" in linf, "0.0173" in l2; what is not reached is "inf"."""
    if not math.isfinite(eps) or norm == "l2":
        return f"{eps:.3g}"
    exact = format_eps(eps)
    return exact if exact.endswith("/255") or exact == "0" else f"{255 * eps:.3g}/255"


def _one_of(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        offer = ", ".join(str(one) for one in known if one is not None)
        raise ThreatError(f"{name} must be one of {offer}, not {quote(value)}", field=name, code=f"{name}_invalid")
