"""How images are attacked: which attacks, in which order, with which budgets, within which balls."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pmgaft.attacks import Budget
from pmgaft.attacks.menu import ATTACKS
from pmgaft.errors import ThreatError, quote
from pmgaft.threat import Grid, Norm, ThreatModel, parse_eps

DEFAULT_ATTACKS = ("apgd-ce", "apgd-margin")
"""Sound for any number of classes: one loss that looks at all of them, one that never fades."""

AUTOATTACK = "autoattack"
"""Not of the menu: a package of its own, with settings of its own."""

_ALIASES = {"pgd": "pgd-ce", "apgd": "apgd-ce"}
_DEFAULT_STEPS = {"pgd": 10, "apgd": 50, "square": 1000}
_SPEC = re.compile(r"(?P<name>[a-z][a-z-]*)(?::(?P<steps>\d+)(?:x(?P<restarts>\d+))?)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedAttack:
    """An attack of the menu with what it may spend on one image. `str` gives what `parse_attack` reads."""

    name: str
    budget: Budget

    def __str__(self) -> str:
        """Such as "apgd-ce:50" or "pgd-margin:20x5"."""
        if self.name == AUTOATTACK:
            return self.name
        restarts = f"x{self.budget.restarts}" if self.budget.restarts > 1 else ""
        return f"{self.name}:{self.budget.steps}{restarts}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """What is done to every image that is answered rightly when clean.

    attacks: in this order, the later ones on what the earlier ones left; none: clean answers are all there is.
    threats: of one norm and grid, eps strictly rising; an image broken within a smaller ball is broken within the
    larger ones too, and is not attacked again.
    each_alone: every attack on every image in every ball, so that each attack has a figure of its own.
    Image i of a set has the attack seed `seed` + i, whatever batch it is in and however many others are judged.
    """

    attacks: tuple[NamedAttack, ...] = ()
    threats: tuple[ThreatModel, ...] = ()
    seed: int = 0
    each_alone: bool = False

    def __post_init__(self) -> None:
        """Refuse balls that are no rising list of one kind."""
        radii = [threat.eps for threat in self.threats]
        if radii != sorted(set(radii)) or len({(threat.norm, threat.grid) for threat in self.threats}) > 1:
            raise ValueError("threats must have one norm and grid, and rising eps")

    @property
    def grid(self) -> Grid:
        """Where the perturbation lives."""
        return self.threats[0].grid if self.threats else "model-input"

    def to_json(self) -> dict[str, Any]:
        """Everything that decides what the attacks do."""
        return {
            "threat_models": [threat.to_json() for threat in self.threats],
            "attacks": [_attack_json(attack) for attack in self.attacks],
            "each_alone": self.each_alone,
            "kept": "the first broken point of each image, else its point of highest loss",
            "precision": "float32",
            "seed": self.seed,
        }

    def __str__(self) -> str:
        """Such as "worst of apgd-ce:50, apgd-margin:50; linf, eps 1/255 2/255, model-input grid"."""
        if not self.attacks:
            return "clean only"
        names = ", ".join(map(str, self.attacks))
        eps = " ".join(str(threat.to_json()["eps"]) for threat in self.threats)
        worst = f"worst of {names}" if len(self.attacks) > 1 else names
        return f"{worst}; {self.threats[0].norm}, eps {eps}, {self.grid} grid"


def parse_attacks(
    texts: Sequence[str], *, steps: int | None = None, restarts: int | None = None, step_size: float | None = None
) -> tuple[NamedAttack, ...]:
    """Attacks as people write them: "apgd-ce", "apgd-ce:100", "pgd-margin:20x5" (20 steps, 5 restarts); "pgd" is
    "pgd-ce". What a text leaves out comes from `steps` and `restarts`, else from the attack's own default. "none"
    alone is no attack.

    Raises: ThreatError (attack_invalid) for what is no attack, for "none" among others, and for one named twice.
    """
    if "none" in texts:
        if len(texts) > 1:
            raise _attack_error("none leaves nothing to name beside it")
        return ()
    attacks = [_parse(text, steps, restarts, step_size) for text in texts]
    names = [attack.name for attack in attacks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise _attack_error(f"{twice} is named twice")
    return tuple(attacks)


def parse_threats(eps: str, norm: Norm, grid: Grid) -> tuple[ThreatModel, ...]:
    """ "0,1/255,2/255" -> balls of rising size. Raises: ThreatError (eps_invalid, norm_invalid, grid_invalid)."""
    radii = sorted({parse_eps(part, norm) for part in eps.split(",")})
    return tuple(ThreatModel(norm=norm, eps=radius, grid=grid) for radius in radii)


def _parse(text: str, steps: int | None, restarts: int | None, step_size: float | None) -> NamedAttack:
    match = _SPEC.fullmatch(text.strip())
    name = _ALIASES.get(match["name"], match["name"]) if match else ""
    if match is not None and name == AUTOATTACK:
        if match["steps"]:
            raise _attack_error(f"{AUTOATTACK} has settings of its own; name it without any")
        return NamedAttack(name=name, budget=Budget())
    if match is None or name not in ATTACKS:
        raise _attack_error(f"there is no attack {quote(text)}; there are {', '.join(ATTACKS)}, {AUTOATTACK}, and none")
    taken = int(match["steps"]) if match["steps"] else steps or _DEFAULT_STEPS[name.partition("-")[0]]
    tries = int(match["restarts"]) if match["restarts"] else restarts or 1
    step = step_size if name.startswith("pgd") else None
    return NamedAttack(name=name, budget=Budget(steps=taken, restarts=tries, step_size=step))


def _attack_json(attack: NamedAttack) -> dict[str, Any]:
    budget = attack.budget
    if attack.name == AUTOATTACK:
        return {"name": attack.name, "settings": "version standard of the package pyautoattack"}
    facts: dict[str, Any] = {"name": attack.name, "steps": budget.steps, "restarts": budget.restarts}
    if attack.name.startswith("pgd"):
        facts |= {"step_size": budget.step_size or "2.5 eps / steps", "random_start": budget.random_start}
    return facts


def _attack_error(message: str) -> ThreatError:
    return ThreatError(message, field="attack", code="attack_invalid")
