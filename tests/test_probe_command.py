"""`pmgaft probe` as a person uses it: words, JSON, files, exit codes, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from pmgaft.cli import main
from pmgaft.clip.preprocess import read_pixels
from pmgaft.clip.text import label_features
from tests.conftest import draw  # type: ignore[import-not-found,unused-ignore]

LABELS = "red disc,green square,blue stripes"
QUICK = ["--no-health", "--no-min-eps", "--wording", "none", "--steps", "10"]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "picture.png"
    draw(0).save(path)
    return path


def run(picture: Path, model: Path, *options: str, labels: str = LABELS) -> Result:
    command = ["probe", str(picture), "--labels", labels, "--model", f"local-dir:{model}", "--device", "cpu", *options]
    return CliRunner().invoke(main, command)


def report(picture: Path, model: Path, *options: str, labels: str = LABELS) -> Any:
    result = run(picture, model, "--json", *options, labels=labels)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_whole_report_as_json_in_the_stated_order(picture: Path, tiny_clip_dir: Path) -> None:
    found = report(
        picture, tiny_clip_dir, "--eps", "8/255", "--targets", "1", "--square", "5", "--certify", "0.1", "--draws", "20"
    )
    order = [
        "verdict",
        "threat_model",
        "min_eps",
        "targets",
        "clean",
        "adversarial",
        "health",
        "survival",
        "certificate",
        "wording",
        "gradients",
    ]
    assert [name for name in found if name in order] == order
    assert found["verdict"] in ("broken", "not_broken", "inconclusive")
    threat = found["threat_model"]
    assert (threat["norm"], threat["eps"], threat["grid"]) == ("linf", "8/255", "model-input")
    assert {"attack", "losses", "steps", "restarts", "step_size", "precision", "seed", "seconds"} <= set(threat)
    assert len(found["model"]["hash"]) == len(found["labels"]["sha256"]) == 64
    assert found["min_eps"]["failed_eps_value"] < found["min_eps"]["eps_value"]
    assert found["min_eps"]["label"] in LABELS.split(",")
    assert sum(one["probability"] for one in found["clean"]["top"]) == pytest.approx(1)
    assert found["certificate"]["norm"] == "l2"
    assert "smoothed" in found["certificate"]["said"]
    assert found["wording"]["templates"] == 7


def test_people_read_verdict_threat_and_cost(picture: Path, tiny_clip_dir: Path) -> None:
    result = run(picture, tiny_clip_dir, "--eps", "8/255", "--square", "5")
    assert result.exit_code == 0, result.output
    for words in (
        "linf, eps 8/255, model-input grid",
        "smallest eps found",
        "health of the attack",
        "gradients",
        "seed 0",
    ):
        assert words in result.stdout
    for claim in ("robust", "proven", "safe"):
        assert claim not in result.stdout


def test_a_saved_image_fools_the_model_when_read_again(
    picture: Path, tiny_clip: Any, tiny_clip_dir: Path, tmp_path: Path
) -> None:
    image, change = tmp_path / "adversarial.png", tmp_path / "difference.png"
    found = report(
        picture,
        tiny_clip_dir,
        "--eps",
        "32/255",
        "--save-adversarial",
        str(image),
        "--save-difference",
        str(change),
        *QUICK,
    )
    assert found["verdict"] == "broken"
    assert len(found["survival"]) == 5
    assert change.is_file()
    saved = found["saved"]["adversarial"]
    again = read_pixels(image.read_bytes(), tiny_clip.preprocess)
    with torch.no_grad():
        logits = tiny_clip.logits(again[None], label_features(tiny_clip.text.encode, LABELS.split(",")))[0]
    answer = LABELS.split(",")[int(logits.argmax())]
    assert saved["label"] == answer
    assert saved["flips_when_read_again"] == (answer != found["clean"]["label"])
    assert float((again - read_pixels(picture.read_bytes(), tiny_clip.preprocess)).abs().max()) <= 32 / 255 + 1e-6


def test_a_file_that_fools_nobody_any_more_is_called_that(
    picture: Path, tiny_clip: Any, tiny_clip_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if rounding had taken the whole change away: the file read again decides, not what was meant to be in it."""
    clean = read_pixels(picture.read_bytes(), tiny_clip.preprocess)
    monkeypatch.setattr("pmgaft.probe.full.surviving_pixels", lambda *arguments: (clean, True))
    found = report(picture, tiny_clip_dir, "--eps", "32/255", "--save-adversarial", str(tmp_path / "a.png"), *QUICK)
    assert found["verdict"] == "broken"
    assert found["saved"]["adversarial"]["flips_when_read_again"] is False
    assert "rounding to 8 bits saved the answer" in found["saved"]["adversarial"]["note"]


def test_where_nothing_broke_nothing_is_saved(picture: Path, tiny_clip_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "none.png"
    found = report(picture, tiny_clip_dir, "--eps", "0", "--save-adversarial", str(file), *QUICK)
    assert found["verdict"] == "not_broken"
    assert not file.exists()
    assert "nothing was saved" in found["saved"]["note"]


def test_the_same_question_has_the_same_answer_and_id(picture: Path, tiny_clip_dir: Path) -> None:
    first, second, other = (report(picture, tiny_clip_dir, "--seed", seed, *QUICK) for seed in ("1", "1", "2"))
    for one in (first, second):
        del one["seconds"], one["probe_seconds"]
    assert first == second
    assert other["id"] != first["id"]


def test_it_can_be_a_gate(picture: Path, tiny_clip_dir: Path) -> None:
    def code(*options: str) -> int:
        return run(picture, tiny_clip_dir, *options, *QUICK).exit_code

    assert code("--eps", "32/255") == 0
    assert code("--eps", "32/255", "--fail-on", "broken") == 3
    assert code("--eps", "0", "--fail-on", "broken", "--fail-on", "inconclusive") == 0
    assert code("--eps", "32/255", "--seconds", "0", "--fail-on", "broken") == 0
    assert code("--eps", "32/255", "--seconds", "0", "--fail-on", "broken", "--fail-on", "inconclusive") == 4


def test_groups_and_targets_are_named_by_label(picture: Path, tiny_clip_dir: Path) -> None:
    found = report(picture, tiny_clip_dir, "--group", "red disc, blue stripes", "--target", "green square", *QUICK)
    assert found["threat_model"]["groups"] == [[0, 2]]
    assert found["threat_model"]["target"] == 1


@pytest.mark.parametrize(
    ("options", "labels", "words"),
    [
        ([], "cat", "at least two labels"),
        ([], "cat,cat", "the same"),
        (["--group", "cat,cow"], "cat,dog", "'cow' is none of the labels"),
        (["--target", "cow"], "cat,dog", "'cow' is none of the labels"),
        (["--eps", "2"], "cat,dog", "2/255"),
        (["--loss", "dlr"], "cat,dog", "needs 3 answers, not 2"),
        (["--template", "nothing"], "cat,dog", "neither a template"),
        (["--certify", "-1", *QUICK], "cat,dog", "sigma"),
    ],
)
def test_mistakes_are_named_in_one_line(
    picture: Path, tiny_clip_dir: Path, options: list[str], labels: str, words: str
) -> None:
    result = run(picture, tiny_clip_dir, *options, labels=labels)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("pmgaft: error: ")


def test_without_labels_it_says_how_to_give_them(picture: Path) -> None:
    result = CliRunner().invoke(main, ["probe", str(picture)])
    assert result.exit_code == 2
    assert "--labels" in result.stderr
