"""An answer as a person wants to read it, on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.style import Style
from rich.text import Text

from .protocol import Answer, Prediction, ProbeAnswer

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
    model, milliseconds = answer.model, answer.timing_ms["total"]
    console.print(Text(f"  {model.name}, {model.engine}, {milliseconds:.1f} ms", style="dim"))


def sentence(probe: ProbeAnswer) -> str:
    """A verdict in one sentence: what was found, under which threat model, with which effort."""
    threat = f"{probe.threat_model['norm']}, eps {probe.threat_model['eps']}, {probe.threat_model['grid']} grid"
    effort = f"{probe.gradients} gradients, {probe.seconds:.1f} s"
    clean = f"{probe.clean.label!r} ({probe.clean.probability:.0%})"
    if probe.verdict == "broken" and probe.adversarial is not None:
        now = f"{probe.adversarial.label!r} ({probe.adversarial.probability:.0%})"
        return f"broken: an image within {threat} turns {clean} into {now} [{effort}]"
    if probe.verdict == "not_broken":
        return (
            f"not broken: this attack found no image within {threat} that changes {clean}; others may exist [{effort}]"
        )
    return f"inconclusive: within {threat}, {probe.reason} [{effort}]"


def _row(prediction: Prediction, width: int) -> Text:
    filled = round(prediction.probability * _BAR)
    label = prediction.label if len(prediction.label) <= width else prediction.label[: width - 1] + "…"
    row = Text(f"  {label:<{width}}  ")
    row.append("█" * filled, Style(color="cyan"))
    row.append("░" * (_BAR - filled), Style(dim=True))
    return row.append(f"  {prediction.probability:6.1%}")


def _verdict(probe: ProbeAnswer) -> Text:
    return Text(sentence(probe), Style(color=_VERDICTS[probe.verdict]))
