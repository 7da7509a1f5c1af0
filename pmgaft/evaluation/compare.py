"""Results side by side: methods with the spread over their seeds, and pairs of models on the same images.

Letters: m methods, s seeds of a method.
"""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from pmgaft.errors import InputError
from pmgaft.evaluation.report import MARK, SCHEMA, Share, attack_text, markdown_table, positive_eps
from pmgaft.evaluation.work import differences
from pmgaft.training.log import LOG_FILE, read_log

EVALUATION_FILE = "evaluation.json"
"""In a run's directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What one argument names. result: None for a run that has not been evaluated. log: of a run, else None."""

    method: str
    path: Path
    result: dict[str, Any] | None
    log: list[dict[str, Any]] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two models on the same images. only_first, only_second: images that one of them alone answers rightly."""

    what: str
    images: int
    only_first: int
    only_second: int

    @property
    def p(self) -> float:
        """Of McNemar's exact test: the chance of so uneven a split, or more, if both were equally good."""
        return mcnemar(self.only_first, self.only_second)


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided exact p: of the images on which two models differ, each goes to either with probability 1/2.

    Source: McNemar 1947, with the binomial in place of the chi-squared approximation.
    """
    differing = only_first + only_second
    tail = sum(math.comb(differing, count) for count in range(min(only_first, only_second) + 1))
    return float(min(1.0, 2 * tail / 2**differing))


def read_entries(arguments: Sequence[str]) -> list[Entry]:
    """Arguments are results (.json) and directories of runs, as paths or patterns, "NAME=" before those of one method.

    Raises: InputError for what is neither.
    """
    entries: list[Entry] = []
    for argument in arguments:
        name, equals, pattern = argument.partition("=")
        if not equals or Path(argument).exists():
            name, pattern = "", argument
        paths = sorted(map(Path, glob.glob(pattern)))
        if not paths:
            raise InputError(f"there is no result or run {pattern}")
        entries += [_entry(name, path) for path in paths]
    return entries


def by_method(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Method -> its evaluated seeds, in the order given. Raises: InputError where results cannot stand side by side."""
    methods: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.result is not None:
            methods.setdefault(entry.method, []).append(entry)
    evaluated = [entry for seeds in methods.values() for entry in seeds]
    for entry in evaluated[1:]:
        _check_alike(evaluated[0], entry)
    return methods


def eps_of(methods: Mapping[str, Sequence[Entry]]) -> list[str]:
    """The balls that all results share, as people write them."""
    return positive_eps(_result(next(iter(methods.values()))[0]))


def averages_table(methods: Mapping[str, Sequence[Entry]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: a method's averages over the sets, percent, mean and standard deviation over seeds."""
    radii = eps_of(methods)
    rows = []
    for method, entries in methods.items():
        averages = [_result(entry)["average"] for entry in entries]
        failed = any(not _result(entry)["checks"]["passed"] for entry in entries)
        values = [[average["clean"] for average in averages]]
        values += [[average["robust"][eps] for average in averages] for eps in radii]
        rows.append([method + (f" {MARK}" if failed else ""), str(len(entries)), *map(_spread, values)])
    return ["method", "seeds", "clean %", *(f"{eps} %" for eps in radii)], rows


def sets_table(methods: Mapping[str, Sequence[Entry]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: each set by each method; of one seed with Wilson intervals, of several mean and deviation."""
    radii = eps_of(methods)
    rows = []
    for place, name in enumerate(_set_names(methods)):
        for method, entries in methods.items():
            found = [_result(entry)["sets"][place] for entry in entries]
            failed = any(check["passed"] is False for one in found for check in one["checks"])
            shares = [[one["clean"] for one in found], *([one["robust"][eps] for one in found] for eps in radii)]
            cells = [
                str(Share(count=some[0]["count"], total=some[0]["total"]))
                if len(some) == 1
                else _spread([share["value"] for share in some])
                for some in shares
            ]
            rows.append([name, method + (f" {MARK}" if failed else ""), *cells])
    return ["set", "method", "clean %", *(f"{eps} %" for eps in radii)], rows


def pairs(first: Entry, second: Entry) -> list[Pair]:
    """Set by set, clean and at each eps: where one of two models alone is right.

    Raises: InputError if their rows are of different images.
    """
    one, other = _rows(first), _rows(second)
    if one["key"] != other["key"]:
        raise InputError(f"{first.path} and {second.path} did not see the same images")
    found = []
    balls = {model["eps_value"]: model["eps"] for model in _result(first)["protocol"]["threat_models"]}
    for name in dict.fromkeys(key[0] for key in one["key"]):
        for ball, (eps, text) in enumerate(balls.items()):
            places = [place for place, key in enumerate(one["key"]) if key[0] == name and key[2] == eps]
            if ball == 0:
                found.append(_pair(f"{name}, clean", one["right"], other["right"], places))
            if eps > 0:
                found.append(_pair(f"{name}, {text}", one["robust"], other["robust"], places))
    return found


def pairs_table(methods: Mapping[str, Sequence[Entry]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: the first method against each other one, seed by seed in the order given."""
    (baseline, firsts), *others = methods.items()
    rows = []
    for method, seconds in others:
        for number, (one, other) in enumerate(zip(firsts, seconds, strict=False), start=1):
            seed = str(number) if len(firsts) > 1 or len(seconds) > 1 else ""
            for pair in pairs(one, other):
                figures = [str(pair.images), str(pair.only_first), str(pair.only_second), f"{pair.p:.2g}"]
                rows.append([f"{baseline} / {method}", seed, pair.what, *figures])
    return ["first / second", "seed", "set, eps", "images", "only first", "only second", "p"], rows


def comparison_json(methods: Mapping[str, Sequence[Entry]]) -> dict[str, Any]:
    """The numbers of all tables, for programs."""
    radii = eps_of(methods)
    found: dict[str, Any] = {}
    for method, entries in methods.items():
        averages = [_result(entry)["average"] for entry in entries]
        values = {"clean": [average["clean"] for average in averages]}
        values |= {eps: [average["robust"][eps] for average in averages] for eps in radii}
        found[method] = {
            "results": [str(entry.path) for entry in entries],
            "checks_passed": all(_result(entry)["checks"]["passed"] for entry in entries),
            "average": {
                key: {"mean": mean(some), "deviation": stdev(some) if len(some) > 1 else None, "seeds": some}
                for key, some in values.items()
            },
        }
    return {"protocol": _result(next(iter(methods.values()))[0])["protocol"], "methods": found}


def comparison_markdown(methods: Mapping[str, Sequence[Entry]], pictures: Sequence[str]) -> str:
    """The page."""
    lines = ["# Comparison", ""]
    if methods:
        example = _result(next(iter(methods.values()))[0])
        names = ", ".join(map(attack_text, example["protocol"]["attacks"]))
        threats = example["protocol"]["threat_models"]
        if names:
            lines += [f"Attacks, worst case per image: {names}; {threats[0]['norm']}, {threats[0]['grid']} grid.", ""]
        seeds = "mean ± standard deviation over seeds"
        lines += [f"Averages over {len(example['sets'])} sets, percent; {seeds}.", ""]
        lines += [*markdown_table(*averages_table(methods)), "", "## Per set", ""]
        lines += [*markdown_table(*sets_table(methods))]
        if len(methods) > 1:
            lines += ["", "## Pairs of models on the same images", ""]
            lines += ["Images that one of the two alone answers rightly, and McNemar's exact p (two-sided).", ""]
            lines += markdown_table(*pairs_table(methods))
    lines += [line for picture in pictures for line in ("", f"![{Path(picture).stem}]({picture})")]
    return "\n".join(lines) + "\n"


def _entry(name: str, path: Path) -> Entry:
    if path.is_dir():
        file, log = path / EVALUATION_FILE, path / LOG_FILE
        if not file.is_file() and not log.is_file():
            raise InputError(f"{path} is no run of pmgaft train: it has neither {EVALUATION_FILE} nor {LOG_FILE}")
        return Entry(
            method=name or path.resolve().name,
            path=file,
            result=_read(file) if file.is_file() else None,
            log=read_log(path) if log.is_file() else None,
        )
    result = _read(path)
    return Entry(method=name or Path(str(result["model"]["name"])).name, path=path, result=result, log=None)


def _read(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        schema = result["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no result of pmgaft evaluate") from error
    if schema != SCHEMA:
        raise InputError(f"{path} is of schema {schema}; this version reads {SCHEMA}: run pmgaft evaluate again")
    return result


def _check_alike(one: Entry, other: Entry) -> None:
    """Figures of different attacks, images or prompts say nothing about each other."""
    ours, theirs = (_what_counts(_result(entry)) for entry in (one, other))
    differing = differences(ours, theirs)
    if differing:
        raise InputError(f"{one.path} and {other.path} cannot be compared: they differ in {', '.join(differing)}")


def _what_counts(result: Mapping[str, Any]) -> dict[str, Any]:
    protocol = {key: value for key, value in result["protocol"].items() if key != "seed"}
    images = {"limit": result["asked"]["limit"]}
    if images["limit"] is not None:
        images["seed"] = result["protocol"]["seed"]  # it draws the images
    sets = {entry["name"]: [entry["hash"], entry["templates"]] for entry in result["sets"]}
    return {"protocol": protocol, "images": images, "sets": sets}


def _rows(entry: Entry) -> dict[str, list[Any]]:
    file = entry.path.parent / str(_result(entry)["outcomes"])
    try:
        table = pq.read_table(file, columns=["set", "index", "eps", "label", "clean", "robust"], partitioning=None)
    except (OSError, ValueError) as error:
        raise InputError(f"{entry.path} names the rows in {file}, which cannot be read") from error
    columns = [table[name].to_pylist() for name in ("set", "index", "eps")]
    return {
        "key": list(zip(*columns, strict=True)),
        "right": pc.equal(table["label"], table["clean"]).to_pylist(),
        "robust": table["robust"].to_pylist(),
    }


def _pair(what: str, one: Sequence[bool], other: Sequence[bool], places: Sequence[int]) -> Pair:
    return Pair(
        what=what,
        images=len(places),
        only_first=sum(one[place] and not other[place] for place in places),
        only_second=sum(other[place] and not one[place] for place in places),
    )


def _result(entry: Entry) -> dict[str, Any]:
    assert entry.result is not None
    return entry.result


def _set_names(methods: Mapping[str, Sequence[Entry]]) -> list[str]:
    return [str(entry["name"]) for entry in _result(next(iter(methods.values()))[0])["sets"]]


def _spread(values: Sequence[float]) -> str:
    """Percent: "48.1", or "48.1 ± 0.6" over several seeds."""
    return f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")
