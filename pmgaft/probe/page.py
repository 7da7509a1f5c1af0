"""A folder's rows for people: one static HTML page without scripts, beside which the drawings lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from pmgaft.probe.folder import Row
from pmgaft.probe.summary import VERDICTS, breaking_eps

_WORDS = {"broken": "broken", "not_broken": "not broken", "inconclusive": "inconclusive", "error": "not read"}

_MEANING = (
    "<b>Broken</b>: an image within the stated limits was found to which the model's own answer is another. "
    "<b>Not broken</b>: this attack, with this budget, found none; another may. "
    "<b>Inconclusive</b>: nothing can be said. Right or wrong is not judged here: it is the stability of the answer."
)
_TRUTH = (
    "The folders' names were taken as true labels. <b>Accuracy</b> is the share of all pictures that are answered "
    "rightly and whose answer stands."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """What stands in a card. height: of width 420. alternative: in words."""

    height: float
    alternative: str


def page(
    rows: Sequence[Row], drawings: Mapping[str, Drawing], summary: Mapping[str, Any], charts: Sequence[str]
) -> str:
    """The HTML. drawings: by a row's `picture`. charts: SVG. The weakest answers come first."""
    style = files("pmgaft.probe").joinpath("page.css").read_text(encoding="utf-8")
    figures = "".join(f"<figure>{chart}</figure>" for chart in charts)
    cards = "".join(_card(row, drawings.get(row.picture or "")) for row in sorted(rows, key=_weakest_first))
    meaning = f"{_MEANING} {_TRUTH}" if summary["true_labels"] else _MEANING
    stopped = f" Stopped after {len(rows)} of {summary['files']} pictures." if summary["stopped"] else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"script-src 'none'; object-src 'none'\">"
        f"<title>Probe: {escape(summary['source'])}</title><style>\n{style}</style></head>\n<body>"
        f"<h1>pmgaft probe &middot; {escape(summary['source'])} &middot; {escape(summary['model']['name'])}</h1>"
        f'<p class="sentence">{escape(summary["sentence"])}</p>'
        f'<p class="note">{meaning}{stopped}</p>\n{_tiles(summary)}\n<div class="charts">{figures}</div>\n'
        f"{_curve_table(summary)}{_asked(summary)}\n"
        f"<h2>Picture by picture, the weakest answers first</h2>{_filter(summary)}\n"
        f'<main class="cards">{cards}</main>\n'
        '<footer>The same as tables: <a href="images.csv">images.csv</a>, <a href="report.json">report.json</a>, '
        f'<a href="junit.xml">junit.xml</a>. pmgaft {escape(summary["pmgaft"])}.</footer></body></html>\n'
    )


def _tiles(summary: Mapping[str, Any]) -> str:
    counts = summary["verdicts"]
    tiles = [(verdict, str(counts[verdict]), _WORDS[verdict]) for verdict in _occurring(counts)]
    if summary["median_min_eps"]:
        tiles.append(("", summary["median_min_eps"], "median of the smallest eps"))
    at = {point["eps_value"]: point for point in summary["curve"]}
    if summary["true_labels"]:
        tiles.append(("", f"{at[0.0]['accuracy']:.0%}", "accuracy"))
        own = summary["threat_model"]
        tiles.append(("", f"{at[own['eps_value']]['accuracy']:.0%}", f"accuracy at eps {own['eps']}"))
    return (
        '<ul class="tiles">'
        + "".join(f'<li class="{kind}"><b>{escape(figure)}</b>{escape(words)}</li>' for kind, figure, words in tiles)
        + "</ul>"
    )


def _curve_table(summary: Mapping[str, Any]) -> str:
    columns = ["eps", "stand", *(["accuracy"] if summary["true_labels"] else [])]
    lines = [
        [point["eps"], f"{point['standing']:.1%}", *([f"{point['accuracy']:.1%}"] if summary["true_labels"] else [])]
        for point in summary["curve"]
    ]
    return f"<details><summary>The curve in figures</summary>{_table([columns, *lines])}</details>"


def _asked(summary: Mapping[str, Any]) -> str:
    threat = summary["threat_model"]
    time = "no limit" if threat["seconds"] is None else f"at most {threat['seconds']:g} s a batch"
    groups = ["; ".join(", ".join(summary["labels"][k] for k in group) for group in threat["groups"])]
    lines = [
        ["model", f"{summary['model']['name']} (sha256 {summary['model']['hash'][:12]})"],
        ["threat model", f"{threat['norm']}, eps {threat['eps']}, {threat['grid']} grid"],
        ["attack", f"{threat['attack']} on {' then '.join(threat['losses'])}"],
        ["budget", f"{threat['restarts']} x {threat['steps']} steps of each loss, {time}"],
        ["first step", threat["step_size"]],
        ["precision, seed", f"{threat['precision']}, {threat['seed']}"],
        ["target", "any other answer" if threat["target"] is None else summary["labels"][threat["target"]]],
        *([["one answer", *groups]] if threat["groups"] else []),
        ["labels", _listed(summary["labels"], ", ")],
        ["templates", _listed(summary["templates"], " | ")],
    ]
    return f"<details><summary>What was asked</summary>{_table(lines)}</details>"


def _filter(summary: Mapping[str, Any]) -> str:
    counts = summary["verdicts"]
    occurring = _occurring(counts)
    if len([verdict for verdict in occurring if counts[verdict]]) < 2:
        return ""
    choices = [("all", "all", True), *((v, f"{_WORDS[v]} ({counts[v]})", False) for v in occurring if counts[v])]
    return (
        '<fieldset aria-label="Which pictures to show">'
        + "".join(
            f'<label><input type="radio" name="show" id="show-{name}"{" checked" if chosen else ""}>{words}</label>'
            for name, words, chosen in choices
        )
        + "</fieldset>"
    )


def _card(row: Row, drawing: Drawing | None) -> str:
    head = (
        f'<header><h3>{escape(row.file)}</h3><span class="verdict {row.verdict}">{_WORDS[row.verdict]}</span></header>'
    )
    image = ""
    if row.picture and drawing:
        link = escape(quote(row.picture))
        image = (
            f'<a href="{link}"><img src="{link}" loading="lazy" decoding="async" width="420" '
            f'height="{drawing.height:.0f}" alt="{escape(drawing.alternative)}"></a>'
        )
    said = "".join(f"<p>{line}</p>" for line in _said(row))
    return f'<article class="card {row.verdict}">{head}{image}{said}</article>\n'


def _said(row: Row) -> list[str]:
    """HTML, a paragraph each."""
    found = row.document
    if found is None:
        return [_first_upper(escape(row.error or "")) + "."]
    lines = [_first_upper(escape(found["statement"])) + "."]
    least = found["min_eps"]
    if least and least["eps"] is not None:
        lines.append(
            f"Smallest eps found: <strong>{escape(least['eps'])}</strong>, turning the answer into "
            f"<strong>{escape(least['label'])}</strong>."
        )
    elif least:
        lines.append("No eps was found that changes the answer.")
    if row.truth is not None:
        lines.append(f"True label: <strong>{escape(row.truth)}</strong>.")
    lines += [
        f"Check failed, {escape(check['name'].replace('_', ' '))}: {escape(check['said'])}."
        for check in found["health"]
        if check["passed"] is False
    ]
    wording = found["wording"]
    if wording and wording["flipped_by_template"]:
        flipped = wording["flipped_by_template"]
        example = f"“{escape(flipped[0]['wording'])}” makes it <strong>{escape(flipped[0]['label'])}</strong>"
        lines.append(f"{len(flipped)} of {wording['templates']} other templates change the answer: {example}.")
    return lines


def _weakest_first(row: Row) -> tuple[int, float, str]:
    """Broken ones by the smallest eps, then all others by theirs; what could not be read comes last."""
    eps = breaking_eps(row)
    rank = {"broken": 0, "not_broken": 1, "inconclusive": 1, "error": 2}[row.verdict]
    return rank, float("inf") if eps is None else eps, row.file


def _occurring(counts: Mapping[str, int]) -> list[str]:
    """The verdicts to speak of: the two plain ones always."""
    return [verdict for verdict in VERDICTS if counts[verdict] or verdict in ("broken", "not_broken")]


def _table(lines: Sequence[Sequence[str]]) -> str:
    body = "".join(
        f"<tr><th>{escape(str(line[0]))}</th>{''.join(f'<td>{escape(str(cell))}</td>' for cell in line[1:])}</tr>"
        for line in lines
    )
    return f'<div class="scroll"><table>{body}</table></div>'


def _listed(names: Sequence[str], between: str, most: int = 50) -> str:
    rest = f"{between}and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + rest


def _first_upper(words: str) -> str:
    return words[:1].upper() + words[1:]
