"""Reports on the terminal, for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from pmgaft.console import print_table

_VERDICTS = {"broken": "red", "not_broken": "green", "inconclusive": "yellow"}
_MARKS = {True: "ok", False: "FAILED", None: "-"}


_MOST_ROWS = 20


def show_folder(document: Mapping[str, Any], folder: Path) -> None:
    """What is in a folder's report.json, in short. folder: where it lies."""
    summary, images = document["summary"], document["images"]
    click.echo(summary["sentence"])
    rows = []
    for one in images[:_MOST_ROWS]:
        report = one["report"]
        if report is None:
            rows.append((one["file"], "not read", "-", "-", "-"))
            continue
        least = report["min_eps"] or {}
        clean = f"{report['clean']['label']} {report['clean']['probability']:.0%}"
        rows.append(
            (one["file"], one["verdict"].replace("_", " "), clean, least.get("eps") or "-", least.get("label") or "-")
        )
    print_table(("picture", "verdict", "answer", "smallest eps found", "which makes it"), rows)
    if len(images) > _MOST_ROWS:
        click.echo(f"and {len(images) - _MOST_ROWS} more")
    for one in images:
        if one["error"]:
            click.echo(f"{one['file']}: {one['error']}")
    for point in summary["curve"]:
        accuracy = "" if point["accuracy"] is None else f", accuracy {point['accuracy']:.1%}"
        click.echo(f"  at eps {point['eps']:>9}: {point['standing']:.1%} of the answers stand{accuracy}")
    click.echo(f"page  {folder / 'index.html'}")


def show(report: Mapping[str, Any]) -> None:
    """The same as the JSON document, in its order."""
    words = report["verdict"].replace("_", " ")
    click.echo(click.style(f"{words}: ", fg=_VERDICTS[report["verdict"]], bold=True) + report["statement"])
    _threat(report)
    if report["min_eps"]:
        _min_eps(report["min_eps"])
    if report["targets"]:
        _targets(report["targets"])
    _answers(report["clean"], report["adversarial"])
    if report["health"]:
        checks = [
            (check["name"].replace("_", " "), _MARKS[check["passed"]], check["said"]) for check in report["health"]
        ]
        _table("health of the attack", checks)
    if report["survival"]:
        rows = [
            (
                one["treatment"],
                "still fools" if one["flips"] else "harmless",
                f"{one['label']}, {one['linf_distance']} off",
            )
            for one in report["survival"]
        ]
        _table("the image found, once it is", rows)
    _saved(report["saved"])
    if report["certificate"]:
        click.echo(f"\ncertificate: {report['certificate']['said']}")
    if report["wording"]:
        _wording(report["wording"], report["clean"]["label"])
    spent = f"{report['gradients']} gradients, {report['forwards']} forwards, {report['seconds']:.1f} s in all"
    click.echo(f"\n{spent}; report {report['id']}")


def _threat(report: Mapping[str, Any]) -> None:
    threat, labels = report["threat_model"], report["labels"]
    tried = f"{threat['restarts']} x {threat['steps']} steps" if threat["restarts"] > 1 else f"{threat['steps']} steps"
    click.echo(
        f"  {threat['attack']} on {' then '.join(threat['losses'])}, {tried}, first step {threat['step_size']}, "
        f"{threat['precision']}, seed {threat['seed']}"
        + (f", at most {threat['seconds']:g} s" if threat["seconds"] is not None else "")
    )
    click.echo(
        f"  model {report['model']['name']} ({report['model']['hash'][:12]}), "
        f"{labels['count']} labels ({labels['sha256'][:12]})"
    )


def _min_eps(found: Mapping[str, Any]) -> None:
    click.echo()
    if found["eps"] is None:
        click.echo(f"smallest eps: none found, with {found['gradients']} gradients")
        return
    click.echo(f"smallest eps found: {found['eps']}, which turns the answer into {found['label']!r}")
    end = (
        f"an attack within {found['failed_eps']} found nothing"
        if found["finished"]
        else "the search ended before an attempt failed: it may well be smaller"
    )
    first = found["first_order"] or "no gradient"
    click.echo(f"  {end}; first-order estimate {first}; {found['gradients']} gradients")


def _targets(lines: list[Mapping[str, Any]]) -> None:
    click.echo()
    rows = [(line["label"], line["eps"] or "not reached", line["first_order"] or "-") for line in lines]
    print_table(("to get the answer", "smallest eps found", "first order"), rows)


def _answers(clean: Mapping[str, Any], adversarial: Mapping[str, Any] | None) -> None:
    click.echo()
    before = {one["label"]: one["probability"] for one in clean["top"]}
    after = {one["label"]: one["probability"] for one in adversarial["top"]} if adversarial else {}
    rows = [
        (label, *(f"{side[label]:.1%}" if label in side else "" for side in ((before, after) if after else (before,))))
        for label in {**before, **after}
    ]
    margins = [clean["margin"], *([adversarial["margin"]] if adversarial else [])]
    rows.append(("margin (logits)", *(f"{margin:+.2f}" for margin in margins)))
    print_table(("label", "clean", "adversarial")[: 3 if after else 2], rows)


def _table(title: str, rows: list[tuple[str, str, str]]) -> None:
    click.echo(f"\n{title}:")
    first, second = (max(len(row[place]) for row in rows) for place in (0, 1))
    for name, mark, said in rows:
        click.echo(f"  {name:<{first}}  {mark:<{second}}  {said}")


def _saved(saved: Mapping[str, Any] | None) -> None:
    if not saved:
        return
    click.echo()
    if "note" in saved:
        click.echo(saved["note"])
    if "adversarial" in saved:
        one = saved["adversarial"]
        read = f"read again, it is answered {one['label']!r}, {one['linf_distance']} off"
        click.echo(f"saved {one['file']}: {read}" + (f"; {one['note']}" if one["note"] else ""))
    if "difference" in saved:
        one = saved["difference"]
        click.echo(f"saved {one['file']}: what was changed, times {one['amplified']:g}")


def _wording(wording: Mapping[str, Any], clean: str) -> None:
    click.echo("\nwording (another threat than pixels):")
    for kind, flipped in (("templates", "flipped_by_template"), ("synonyms", "flipped_by_synonym")):
        if wording[kind]:
            click.echo(f"  {len(wording[flipped])} of {wording[kind]} other {kind} change {clean!r}")
            for one in wording[flipped][:5]:
                click.echo(f"    {one['wording']!r}: {one['label']}")
            if len(wording[flipped]) > 5:
                click.echo(f"    and {len(wording[flipped]) - 5} more")
