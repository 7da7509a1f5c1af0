"""Results side by side: seeds, paired tests, what may not be compared, and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
from click.testing import CliRunner, Result
from PIL import Image

from pmgaft.cli import main
from pmgaft.evaluation.compare import mcnemar, pairs, read_entries
from pmgaft.evaluation.plots import plot_curves, plot_result, plot_slider
from pmgaft.evaluation.report import SCHEMA, Share

IMAGES = 20


def write_result(path: Path, clean: int, robust: dict[str, int], **changes: Any) -> Path:
    """A result on two sets: the first so many images are right when clean, and robust."""
    radii = {"1/255": 1 / 255, "2/255": 2 / 255}
    threats = [{"norm": "linf", "eps": eps, "eps_value": value, "grid": "model-input"} for eps, value in radii.items()]
    sets: list[dict[str, Any]] = [
        {
            "name": name,
            "hash": name,
            "templates": ["{}"],
            "images": IMAGES,
            "clean": Share(count=clean, total=IMAGES).to_json(),
            "robust": {eps: Share(count=robust[eps], total=IMAGES).to_json() | {"attacks": []} for eps in radii},
            "checks": [{"name": "huge_eps", "passed": changes.pop("passed", True), "said": "so and so", "figures": {}}],
            "merged_classes": [],
        }
        for name in ("cifar10", "dtd10")
    ]
    failed = any(check["passed"] is False for entry in sets for check in entry["checks"])
    result = {
        "schema": SCHEMA,
        "model": {"name": path.stem, "hash": "0" * 64},
        "protocol": {
            "threat_models": threats,
            "attacks": [{"name": "apgd-ce", "steps": 50, "restarts": 1}],
            "seed": 0,
        },
        "sets": sets,
        "average": {
            "sets": 2,
            "clean": clean / IMAGES,
            "robust": {eps: robust[eps] / IMAGES for eps in radii},
        },
        "checks": {"passed": not failed, "failed": []},
        "asked": {"limit": None},
        "outcomes": path.with_suffix(".parquet").name,
    }
    for key, value in changes.items():
        where: Any = result
        *tables, last = key.split("__")
        for table in tables:
            where = where[int(table) if table.isdecimal() else table]
        where[last] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    rows = [
        {
            "set": entry["name"],
            "index": index,
            "eps": value,
            "label": 0,
            "clean": int(index >= clean),
            "robust": index < robust[eps],
        }
        for entry in sets
        for eps, value in radii.items()
        for index in range(IMAGES)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))
    return path


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return write_result(tmp_path / "one.json", 16, {"1/255": 4, "2/255": 1})


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return write_result(tmp_path / "other.json", 14, {"1/255": 12, "2/255": 1})


def compare(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


@pytest.mark.parametrize(("b", "c"), [(0, 0), (3, 0), (0, 8), (5, 5), (40, 61), (700, 900)])
def test_the_paired_test_is_the_exact_binomial(b: int, c: int) -> None:
    expected = scipy.stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)


def test_pairs_count_the_images_that_one_alone_answers_rightly(one: Path, other: Path) -> None:
    first, second = read_entries([str(one), str(other)])
    found = {pair.what: (pair.images, pair.only_first, pair.only_second) for pair in pairs(first, second)}
    assert found["cifar10, clean"] == (IMAGES, 2, 0)
    assert found["dtd10, 1/255"] == (IMAGES, 0, 8)
    assert found["cifar10, 2/255"] == (IMAGES, 0, 0)
    assert len(found) == 6


def test_results_of_one_name_are_seeds_with_mean_and_deviation(one: Path, tmp_path: Path) -> None:
    for seed, robust in enumerate((10, 12, 14)):
        write_result(tmp_path / f"tecoa-{seed}.json", 12, {"1/255": robust, "2/255": 2})
    output = tmp_path / "page.md"
    done = compare(one, f"tecoa={tmp_path}/tecoa-*.json", "--output", output)
    assert done.exit_code == 0, done.output
    (row,) = [line for line in done.stdout.splitlines() if "tecoa" in line and "│     3 │" in line]
    assert "60.0 ± 0.0" in row
    assert "60.0 ± 10.0" in row
    found = json.loads((tmp_path / "page.json").read_text())["methods"]["tecoa"]["average"]["1/255"]
    assert found["mean"] == pytest.approx(0.6)
    assert found["deviation"] == pytest.approx(0.1)
    page = output.read_text()
    assert "| tecoa | 3 | 60.0 ± 0.0 | 60.0 ± 10.0 | 10.0 ± 0.0 |" in page
    assert "| one / tecoa | 1 | cifar10, 1/255 | 20 | 0 | 6 | 0.031 |" in page
    with Image.open(tmp_path / "page.png") as picture:
        assert min(picture.size) > 400


def test_a_failed_self_check_marks_the_method(one: Path, tmp_path: Path) -> None:
    bad = write_result(tmp_path / "bad.json", 16, {"1/255": 16, "2/255": 16}, passed=False)
    lines = compare(one, bad).stdout.splitlines()
    assert any("│ bad !" in line for line in lines)
    assert not any("│ one !" in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"protocol__attacks": [{"name": "pgd-ce", "steps": 10, "restarts": 1}]}, "protocol.attacks"),
        ({"protocol__threat_models__0__grid": "native"}, "protocol.threat_models"),
        ({"sets__0__hash": "other pictures"}, "sets.cifar10"),
        ({"sets__0__templates": ["a {}"]}, "sets.cifar10"),
        ({"asked__limit": 100}, "images.limit"),
    ],
)
def test_what_was_not_measured_alike_is_not_compared(
    changes: dict[str, Any], said: str, one: Path, tmp_path: Path
) -> None:
    unlike = write_result(tmp_path / "unlike.json", 16, {"1/255": 4, "2/255": 1}, **changes)
    done = compare(one, unlike)
    assert done.exit_code == 2
    assert f"they differ in {said}" in done.stderr


def test_other_seeds_draw_other_images_only_where_images_are_drawn(tmp_path: Path) -> None:
    for limit, code in ((None, 0), (10, 2)):
        files = [
            write_result(
                tmp_path / f"seed-{seed}.json", 9, {"1/255": 4, "2/255": 1}, protocol__seed=seed, asked__limit=limit
            )
            for seed in (0, 1)
        ]
        assert compare(*files).exit_code == code


@pytest.mark.parametrize(
    ("content", "said"),
    [("{}", "no result"), ("[1]", "no result"), ("nonsense", "no result"), ('{"schema": 1}', "schema 1")],
)
def test_files_that_are_no_results_are_refused(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    done = compare(tmp_path / "x.json")
    assert done.exit_code == 2
    assert said in done.stderr


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "nowhere.json" in compare(tmp_path / "nowhere.json").stderr


def log(directory: Path, rate: float) -> list[dict[str, Any]]:
    """A run's directory with a log of training, and its events."""
    steps = [
        {"step": step, "loss": 3 * rate**step, "loss_robust": 2 * rate**step, "lr": rate} for step in range(0, 100, 10)
    ]
    events: list[dict[str, Any]] = [{"event": "start", "images": 5}, *({"event": "step"} | step for step in steps)]
    events += [{"event": "judged", "step": step, "clean": 0.5, "robust": step / 200} for step in (50, 100)]
    directory.mkdir()
    (directory / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return events


def test_runs_are_compared_by_their_evaluation_and_show_their_training(tmp_path: Path) -> None:
    for name, rate in (("slow", 0.99), ("fast", 0.95)):
        log(tmp_path / name, rate)
    write_result(tmp_path / "slow" / "evaluation.json", 10, {"1/255": 5, "2/255": 1})
    done = compare(tmp_path / "slow", tmp_path / "fast", "--output", tmp_path / "page.md")
    assert done.exit_code == 0, done.output
    assert "│ slow" in done.stdout
    assert f"{tmp_path / 'fast'} has not been evaluated" in done.stderr
    assert "page-training.png" in (tmp_path / "page.md").read_text()
    assert (tmp_path / "page-training.png").stat().st_size > 10_000


def test_pictures_of_one_result_of_a_slider_and_of_one_run(one: Path, other: Path, tmp_path: Path) -> None:
    results = [json.loads(path.read_text()) for path in (one, other)]
    plot_result(results[0], tmp_path / "deep" / "a.png")
    plot_slider([(0.0, results[0]), (1.0, results[1])], ("mini", "mini-robust"), tmp_path / "b.png")
    plot_curves({"run": log(tmp_path / "run", 0.9)}, tmp_path / "c.png")
    for name in ("deep/a.png", "b.png", "c.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 400
            assert len(picture.convert("RGB").getcolors(10**6) or []) > 20


def test_without_matplotlib_the_tables_still_come(one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pmgaft.evaluation.plots.can_plot", lambda: False)
    done = compare(one, "--output", tmp_path / "page.md")
    assert done.exit_code == 0
    assert 'pip install "pmgaft[plots]"' in done.stderr
    assert ".png" not in (tmp_path / "page.md").read_text()
