"""An answer as a person wants to read it, on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.style import Style
from rich.text import Text

from .probe_protocol import ProbeAnswer
from .protocol import Answer, Prediction

_BAR = 30
_VERDICTS = {"broken": "red", "not_broken": "green", "inconclusive": "yellow"}


def show(console: Console, title: str, answer: Answer) -> None:
    """Ranked labels with bars; below them what the probe found, with its threat model, if there was one."""
    console.print(Text(title, style="bold"))
    width = max(len(prediction.label) for prediction in answer.predictions)
    for prediction in answer.predictions:
        console.print(_row(prediction, min(width, 40)))
    if answer.probe is not None:
        console.print(Padding(_verdict(answer.probe), (0, 0, 0, 2)))
        for line in details(answer.probe):
            console.print(Padding(Text(line), (0, 0, 0, 4)))
    model, milliseconds = answer.model, answer.timing_ms["total"]
    console.print(Text(f"  {model.name}, {model.engine}, {milliseconds:.1f} ms", style="dim"))


def sentence(probe: ProbeAnswer) -> str:
    """A verdict in one sentence: what was found, under which threat model, with which effort."""
    threat = f"{probe.threat_model.norm}, eps {probe.threat_model.eps}, {probe.threat_model.grid} grid"
    effort = f"{probe.gradients} gradients, {probe.seconds:.1f} s"
    clean = f"{probe.clean.label!r} ({probe.clean.probability:.0%})"
    if probe.verdict == "broken" and probe.adversarial is not None:
        now = f"{probe.adversarial.label!r} ({probe.adversarial.probability:.0%})"
        return f"broken: an image within {threat} turns {clean} into {now} [{effort}]"
    if probe.verdict == "not_broken":
        target = probe.threat_model.target
        change = f"changes {clean}" if target is None else f"turns {clean} into {target!r}"
        return f"not broken: this attack found no image within {threat} that {change}; others may exist [{effort}]"
    return f"inconclusive: within {threat}, {probe.reason} [{effort}]"


def details(probe: ProbeAnswer) -> list[str]:
    """What else was asked for, a line each."""
    return [
        *_smallest(probe),
        *_targets(probe),
        *_health(probe),
        *_survival(probe),
        *_wording(probe),
        *([probe.certificate.statement] if probe.certificate else []),
        *([f"the image found: {probe.image.note}"] if probe.image else []),
        *([f"no time was left for: {', '.join(probe.unfinished)}"] if probe.unfinished else []),
    ]


def _smallest(probe: ProbeAnswer) -> list[str]:
    found = probe.min_eps
    if found is None:
        return []
    if found.eps is None:
        return [f"smallest eps: none found, with {found.gradients} gradients"]
    below = f"an attack within {found.failed_eps} found nothing" if found.finished else "it may well be smaller"
    doubt = "" if found.confirmed is not False else "; the engine that serves is not fooled by that image"
    return [f"smallest eps found: {found.eps}, which gives {found.label!r}; {below}{doubt}"]


def _targets(probe: ProbeAnswer) -> list[str]:
    if probe.targets is None:
        return []
    reached = [f"{line.label!r} {line.eps or 'not reached'}" for line in probe.targets]
    return [f"smallest eps found by answer: {', '.join(reached) or 'there is no other answer'}"]


def _health(probe: ProbeAnswer) -> list[str]:
    if probe.health is None:
        return []
    failed = [f"{check.name.replace('_', ' ')} FAILED: {check.said}" for check in probe.health if check.passed is False]
    passed = sum(check.passed is True for check in probe.health)
    return [f"health of the attack: {passed} of {passed + len(failed)} checks passed", *failed]


def _survival(probe: ProbeAnswer) -> list[str]:
    if probe.survival is None:
        return []
    words = [f"{one.treatment}: {'still fools' if one.flips else 'harmless'}" for one in probe.survival]
    return [f"the image found, once it is {'; '.join(words)}"]


def _wording(probe: ProbeAnswer) -> list[str]:
    found = probe.wording
    if found is None:
        return []
    tried = {"templates": (found.templates, found.flipped_by_template)}
    tried["names"] = (found.synonyms, found.flipped_by_synonym)
    lines = []
    for kind, (count, flipped) in tried.items():
        if count:
            such = f", such as {flipped[0].wording!r}: {flipped[0].label!r}" if flipped else ""
            lines.append(f"another threat, words: {len(flipped)} of {count} other {kind} change the answer{such}")
    return lines


def _row(prediction: Prediction, width: int) -> Text:
    filled = round(prediction.probability * _BAR)
    label = prediction.label if len(prediction.label) <= width else prediction.label[: width - 1] + "…"
    row = Text(f"  {label:<{width}}  ")
    row.append("█" * filled, Style(color="cyan"))
    row.append("░" * (_BAR - filled), Style(dim=True))
    return row.append(f"  {prediction.probability:6.1%}")


def _verdict(probe: ProbeAnswer) -> Text:
    return Text(sentence(probe), Style(color=_VERDICTS[probe.verdict]))
