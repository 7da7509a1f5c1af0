"""Results as pictures (PNG). matplotlib is an extra: nothing else here needs it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pmgaft.errors import InputError
from pmgaft.evaluation.report import attack_text, positive_eps
from pmgaft.threat import parse_eps

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito 2008: told apart by colour-blind readers, too."""

_MARKERS = "osD^vPX*"

_Point = tuple[float, float, float]
"""(eps in pixel units, percent, spread over seeds)."""

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_result(result: Mapping[str, Any], path: Path) -> None:
    """One model: clean and robust accuracy per set, and, with several eps, accuracy against eps."""
    sets = result["sets"]
    radii = positive_eps(result)
    curves = len(radii) > 1
    height = 1.1 + 0.5 * len(sets)
    with _figure(path, (10.5 if curves else 7, max(3.2, height)), 2 if curves else 1) as axes:
        _per_set(axes[0], sets, radii)
        if curves:
            _against_eps(axes[1], {entry["name"]: _curve(entry, result) for entry in sets}, result)
            axes[1].set_title("Accuracy against eps")
            axes[1].legend(fontsize=8)
        axes[0].figure.suptitle(_headline(result), fontsize=9, color="#555555", x=0.01, ha="left")


def plot_comparison(methods: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Several methods, each with the results of its seeds: clean against robust on average and per set, and, with
    several eps, the average against eps.
    """
    example = next(iter(methods.values()))[0]
    radii = positive_eps(example)
    names = [entry["name"] for entry in example["sets"]]
    eps = radii[0]
    panels = 1 + (len(radii) > 1)
    per_set = len(names) if len(names) > 1 else 0
    columns = min(3, max(panels, per_set))
    rows = 1 + -(-per_set // columns)
    with _figure(path, (3.6 * columns, 3.2 * rows), columns, rows) as axes:
        _clean_against_robust(axes[0], methods, eps, None)
        axes[0].set_title(f"Average of {len(names)} sets" if per_set else names[0])
        if len(radii) > 1:
            curves = {name: _mean_curve(results) for name, results in methods.items()}
            _against_eps(axes[1], curves, example)
            axes[1].set_title("Average against eps" if per_set else f"{names[0]} against eps")
        for place, name in enumerate(names if per_set else ()):
            axis = axes[columns + place]
            _clean_against_robust(axis, methods, eps, name)
            axis.set_title(name)
        used = {0, *range(1, panels), *range(columns, columns + per_set)}
        for place, axis in enumerate(axes):
            if place not in used:
                axis.set_visible(False)
        axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=5)


def plot_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Training: the loss, each of its terms, the learning rate, and what the held-out images said, against the step.

    runs: name -> the events of its log.jsonl.
    """
    steps = {name: [e for e in events if e["event"] == "step"] for name, events in runs.items()}
    judged = {name: [e for e in events if e["event"] == "judged"] for name, events in runs.items()}
    terms = sorted({key for events in steps.values() for event in events for key in event if key.startswith("loss_")})
    titles = {"loss": "Loss"} | {term: f"Term: {term.removeprefix('loss_')}" for term in terms}
    titles |= {"lr": "Learning rate"}
    shown = [*titles, *(["judged"] if any(judged.values()) else [])]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    with _figure(path, (3.6 * columns, 2.7 * rows), columns, rows) as axes:
        for axis, key in zip(axes, shown, strict=False):
            axis.set_xlabel("step")
            if key == "judged":
                _held_out(axis, judged)
                continue
            for place, (name, events) in enumerate(steps.items()):
                points = [(event["step"], event[key]) for event in events if event.get(key) is not None]
                axis.plot(*_transposed(points), color=_colour(place), linewidth=1.3, label=name)
            axis.set_title(titles[key])
            axis.ticklabel_format(axis="y", scilimits=(-3, 4))
        for axis in axes[len(shown) :]:
            axis.set_visible(False)
        axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=4)


def plot_slider(points: Sequence[tuple[float, Mapping[str, Any]]], names: tuple[str, str], path: Path) -> None:
    """Blends of two models: clean and robust accuracy over the weight of the second, and one against the other.

    points: (weight, result), rising.
    """
    radii = positive_eps(points[0][1])
    weights = [weight for weight, _ in points]
    clean = [100 * result["average"]["clean"] for _, result in points]
    with _figure(path, (9 if radii else 5, 3.6), 2 if radii else 1) as axes:
        axes[0].plot(weights, clean, marker="o", markersize=4, color="#000000", label="clean")
        for place, eps in enumerate(radii):
            robust = [100 * result["average"]["robust"][eps] for _, result in points]
            colour, marker = _colour(place), _MARKERS[place % len(_MARKERS)]
            axes[0].plot(weights, robust, marker=marker, markersize=4, color=colour, label=f"robust, eps {eps}")
            axes[1].plot(clean, robust, marker=marker, markersize=4, color=colour, label=f"eps {eps}")
            for weight, x, y in zip(weights, clean, robust, strict=True) if place == 0 else ():
                axes[1].annotate(f"{weight:g}", (x, y), (4, 4), textcoords="offset points", fontsize=7, color="#555555")
        axes[0].set_xlabel(f"weight of {names[1]} (0 is {names[0]})")
        axes[0].set_ylabel("accuracy, %")
        axes[0].set_ylim(bottom=0)
        axes[0].set_xticks(weights)
        axes[0].set_title("Over the weight")
        axes[0].legend()
        if radii:
            axes[1].set_xlabel("clean accuracy, %")
            axes[1].set_ylabel("robust accuracy, %")
            axes[1].margins(0.12)
            axes[1].set_title("Robust against clean")
            axes[1].legend()


@contextmanager
def _figure(path: Path, size: tuple[float, float], columns: int, rows: int = 1) -> Iterator[list[Any]]:
    """Axes in reading order; written to `path` as a whole, or not at all."""
    if not can_plot():
        raise InputError('plots need matplotlib: pip install "pmgaft[plots]"')
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size)
        FigureCanvasAgg(figure)
        yield list(figure.subplots(rows, columns, squeeze=False).flat)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}.png")
        figure.savefig(scratch, dpi=150)
        scratch.replace(path)


def _per_set(axis: Any, sets: Sequence[Mapping[str, Any]], radii: Sequence[str]) -> None:
    """A line of dots for each set: clean, then each eps, with intervals."""
    kinds: list[tuple[str, str | None]] = [("clean", None), *((f"robust, eps {eps}", eps) for eps in radii)]
    for place, (label, eps) in enumerate(kinds):
        shares = [entry["clean"] if eps is None else entry["robust"][eps] for entry in sets]
        values = [100 * share["value"] for share in shares]
        low = [100 * (share["value"] - share["low"]) for share in shares]
        high = [100 * (share["high"] - share["value"]) for share in shares]
        offset = 0.09 * (place - (len(kinds) - 1) / 2)
        axis.errorbar(
            values,
            [row + offset for row in range(len(sets))],
            xerr=[low, high],
            fmt=_MARKERS[place % len(_MARKERS)],
            markersize=5,
            elinewidth=1,
            color="#000000" if eps is None else _colour(place - 1),
            label=label,
            clip_on=False,
        )
    axis.set_yticks(range(len(sets)), [_marked(entry) for entry in sets])
    axis.set_ylim(len(sets) - 0.5, -0.5)
    axis.set_xlim(0, 100)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("accuracy, % of all images (Wilson intervals of 95 %)")
    axis.set_title("Clean and robust accuracy")
    axis.figure.legend(*axis.get_legend_handles_labels(), loc="outside lower left", ncols=len(kinds))


def _against_eps(axis: Any, curves: Mapping[str, Sequence[_Point]], result: Mapping[str, Any]) -> None:
    grey = result["protocol"]["threat_models"][0]["norm"] == "linf"
    for place, (name, curve) in enumerate(curves.items()):
        radii, values, spread = zip(*curve, strict=True)
        style = {"color": _colour(place), "marker": _MARKERS[place % len(_MARKERS)], "markersize": 4, "linewidth": 1.3}
        style["clip_on"] = False  # a marker on an axis is a marker
        shown = [255 * eps if grey else eps for eps in radii]
        axis.errorbar(shown, values, yerr=spread if any(spread) else None, capsize=2, label=name, **style)
    axis.set_xlabel("eps, grey levels of 255" if grey else "eps (l2, pixel units)")
    axis.set_ylabel("accuracy, %")
    axis.set_xticks(shown)
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)


def _clean_against_robust(
    axis: Any, methods: Mapping[str, Sequence[Mapping[str, Any]]], eps: str, name: str | None
) -> None:
    """A point for each method, with the spread over its seeds; of one set, or of the average."""
    for place, (method, results) in enumerate(methods.items()):
        clean = [_accuracy(result, name, None) for result in results]
        robust = [_accuracy(result, name, eps) for result in results]
        style = {"color": _colour(place), "fmt": _MARKERS[place % len(_MARKERS)], "markersize": 6, "capsize": 2}
        style["clip_on"] = False
        axis.errorbar(mean(clean), mean(robust), xerr=_spread(clean), yerr=_spread(robust), label=method, **style)
    axis.set_xlabel("clean, %")
    axis.set_ylabel(f"robust at {eps}, %")
    axis.margins(0.15)
    axis.set_ylim(bottom=0)


def _held_out(axis: Any, judged: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    for place, events in enumerate(judged.values()):
        for kind, line in (("clean", "--"), ("robust", "-")):
            points = [(event["step"], 100 * event[kind]) for event in events]
            axis.plot(*_transposed(points), line, color=_colour(place), marker="o", markersize=3, linewidth=1.3)
    axis.set_title("Held out: clean (dashed), robust")
    axis.set_ylabel("%")
    axis.set_ylim(bottom=0)


def _accuracy(result: Mapping[str, Any], name: str | None, eps: str | None) -> float:
    """Percent; of the average where no set is named, clean where no eps is."""
    if name is None:
        average = result["average"]
        return 100 * float(average["clean"] if eps is None else average["robust"][eps])
    entry = next(entry for entry in result["sets"] if entry["name"] == name)
    return 100 * float((entry["clean"] if eps is None else entry["robust"][eps])["value"])


def _curve(entry: Mapping[str, Any], result: Mapping[str, Any]) -> list[_Point]:
    points = {0.0: 100 * entry["clean"]["value"]}
    points |= {_number(eps, result): 100 * share["value"] for eps, share in entry["robust"].items()}
    return [(eps, value, 0.0) for eps, value in sorted(points.items())]


def _mean_curve(results: Sequence[Mapping[str, Any]]) -> list[_Point]:
    kinds = {0.0: None} | {_number(eps, results[0]): eps for eps in positive_eps(results[0])}
    values = {eps: [_accuracy(result, None, text) for result in results] for eps, text in sorted(kinds.items())}
    return [(eps, mean(found), _spread(found) or 0.0) for eps, found in values.items()]


def _spread(values: Sequence[float]) -> float | None:
    """Standard deviation over seeds; None for one."""
    return stdev(values) if len(values) > 1 else None


def _number(eps: str, result: Mapping[str, Any]) -> float:
    return parse_eps(eps, result["protocol"]["threat_models"][0]["norm"])


def _marked(entry: Mapping[str, Any]) -> str:
    failed = any(check["passed"] is False for check in entry["checks"])
    return str(entry["name"]) + (" (!)" if failed else "")


def _headline(result: Mapping[str, Any]) -> str:
    protocol = result["protocol"]
    text = str(result["model"]["name"])
    if protocol["attacks"]:
        names = ", ".join(map(attack_text, protocol["attacks"]))
        threat = protocol["threat_models"][0]
        text += f"   {names}   {threat['norm']}, {threat['grid']} grid"
    return text


def _colour(place: int) -> str:
    return _COLOURS[place % len(_COLOURS)]


def _transposed(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
