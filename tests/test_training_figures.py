"""What a run shows: to people, to Prometheus, to TensorBoard; and that its figures are what they are called."""

from __future__ import annotations

import functools
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from pmgaft.cli import main
from pmgaft.clip.loading import load_clip
from pmgaft.data import loader
from pmgaft.errors import InputError
from pmgaft.objectives import cosine_logits
from pmgaft.ranks import Ranks
from pmgaft.training import parts
from pmgaft.training.log import read_log
from pmgaft.training.loop import train
from pmgaft.training.recipe import Recipe
from pmgaft.training.telemetry import Metrics, TensorBoard

CPU = torch.device("cpu")
START = {"model": "m", "data": "d", "device": "cpu", "ranks": 1}
STEP = {
    "step": 7,
    "progress": 0.25,
    "loss": 3.5,
    "loss_ce": 1.5,
    "loss_clean": 2.0,
    "clean_accuracy": 0.75,
    "robust_accuracy": 0.5,
    "lr": 1e-4,
    "eps": 1 / 255,
    "zero_gradient_share": 0.0,
    "seconds": 10.0,
    "seconds_left": 3725.0,
    "images_per_second": 96.0,
}


@pytest.fixture(autouse=True)
def one_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs share the loaded model, which none of them may change: it is loaded once for all tests."""
    monkeypatch.setattr(parts, "load_clip", _loaded)


_loaded = functools.cache(load_clip)


def recipe(model: Path, data: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {"model": f"local-dir:{model}", "data": str(data), "steps": 3, "batch": 12, "log_every": 2}
    return Recipe.model_validate(values | changes)


def run(what: Recipe, where: Path) -> list[dict[str, Any]]:
    train(what, where, device=CPU, resume=False, report=lambda *_: None)
    return [event for event in read_log(where) if event["event"] == "step"]


@pytest.mark.parametrize("objective", ["pmg-aft", "tecoa"])
def test_the_batch_accuracies_are_the_shares_that_the_student_answers_rightly(
    objective: str, tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path
) -> None:
    """With eps 0 and one batch for the whole set, at the first step the student is the model itself."""
    what = recipe(
        tiny_vit_clip_dir, shards, steps=1, batch=48, micro_batch=20, attack={"eps": 0}, objective={"name": objective}
    )
    (step,) = run(what, tmp_path / "run")
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"| {100 * step['clean_accuracy']:.1f} | {100 * step['robust_accuracy']:.1f} |" in report
    clip = _loaded(f"local-dir:{tiny_vit_clip_dir}", None, CPU)
    made = parts.build(what, CPU, Ranks())
    batch = next(loader(made.training_set, made.preprocess, batch_size=48))
    with torch.no_grad():
        answers = cosine_logits(clip.image.raw(batch.pixels), made.learner.texts, 1.0).argmax(dim=1)
    share = float((answers == batch.labels).double().mean())
    assert step["clean_accuracy"] == step["robust_accuracy"] == pytest.approx(share)
    assert 0 < share < 1


def test_objectives_without_adversarial_images_have_no_robust_share(
    tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path
) -> None:
    first, second = run(recipe(tiny_vit_clip_dir, shards, objective={"name": "finetune"}), tmp_path / "run")
    assert [first["step"], second["step"]] == [1, 2]
    assert "clean_accuracy" in first
    assert "robust_accuracy" not in first


def test_the_time_left_follows_from_the_progress(tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path) -> None:
    for step in run(recipe(tiny_vit_clip_dir, shards, steps=4, log_every=1), tmp_path / "run"):
        assert step["seconds_left"] == pytest.approx(step["seconds"] * (4 - step["step"]) / step["step"], abs=0.1)
        assert step["images_per_second"] > 0


def test_a_person_sees_terms_shares_speed_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from pmgaft.training import command

    said: list[str] = []
    monkeypatch.setattr("pmgaft.console.note", said.append)
    monkeypatch.setattr(command._Screen, "_SECONDS_BETWEEN_LINES", 0.0)
    with command._Screen() as screen:
        facts = {"steps": 28, "images": 48, "classes": 3, "held_out": 0, "changed": ["lr"], "step": 6}
        screen.show("resume", START | facts | {"ranks": 4, "same_names": ["crane", "maillot"]})
        screen.show("step", STEP)
    assert said == [
        "the recipe has another lr from here on",
        "m on cpu and 3 more; d: 48 images of 3 classes, 0 held out, going on from step 6",
        (
            "more than one class is called 'crane', 'maillot': no model can tell them apart, and their images "
            "pull it both ways; rename them or give them one label"
        ),
        "step 7: loss 3.5000 (ce 1.500, clean 2.000), clean 75 %, robust 50 %, 96.0 images/s, 1:02:05 left",
    ]


def test_prometheus_reads_the_newest_figures() -> None:
    metrics = Metrics(0)
    metrics.show("start", START)
    metrics.show("step", STEP)
    metrics.show("judged", {"step": 7, "clean": 0.25, "robust": 0.125, "best": True})
    metrics.show("checkpoint", {"step": 7})
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics.port}/metrics", timeout=10) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    shown = dict(line.rsplit(" ", 1) for line in lines)
    expected = {
        'info{data="d",device="cpu",model="m",ranks="1"}': 1,
        "step": 7,
        "progress_ratio": 0.25,
        "seconds_left": 3725,
        "loss": 3.5,
        'loss_term{term="ce"}': 1.5,
        'loss_term{term="clean"}': 2,
        'accuracy_ratio{attacked="no",images="batch"}': 0.75,
        'accuracy_ratio{attacked="yes",images="batch"}': 0.5,
        'accuracy_ratio{attacked="no",images="held_out"}': 0.25,
        'accuracy_ratio{attacked="yes",images="held_out"}': 0.125,
        "learning_rate": 1e-4,
        "eps": 1 / 255,
        "images_per_second": 96,
        "checkpoint_step": 7,
    }
    assert {name: float(value) for name, value in shown.items()} == {
        f"pmgaft_train_{name}": pytest.approx(value) for name, value in expected.items()
    }


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--metrics-port {port} cannot be listened on: Address already in use"):
            Metrics(port)


def test_tensorboard_gets_every_figure_and_a_resumed_run_replaces_what_it_does_anew(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    board.show("start", START)
    board.show("step", STEP | {"step": 1})
    board.show("step", STEP | {"step": 2, "loss": 100.0})
    board.show("judged", {"step": 2, "clean": 0.25, "robust": 0.125, "best": True})
    board.show("end", {})
    again = TensorBoard(tmp_path)
    again.show("resume", START | {"step": 2})
    again.show("step", STEP | {"step": 2, "loss": 1.0})
    again.show("end", {})
    seen = EventAccumulator(str(tmp_path))
    seen.Reload()
    assert [(s.step, s.value) for s in seen.Scalars("train/loss")] == [(1, 3.5), (2, 1.0)]
    assert {"train/loss_ce", "train/clean_accuracy", "train/images_per_second"} <= set(seen.Tags()["scalars"])


def test_without_tensorboard_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pmgaft\[train\]"):
        TensorBoard(tmp_path)


def test_the_command_writes_for_tensorboard_and_prometheus_and_takes_changes(
    tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path
) -> None:
    def command(*more: str) -> Any:
        settings = [f"model=local-dir:{tiny_vit_clip_dir}", "epochs=1", "batch=24", "hold_out=0"]
        chosen = [word for setting in settings for word in ("--set", setting)]
        return CliRunner().invoke(
            main, ["train", "tecoa", "--data", str(shards), "--output-dir", str(tmp_path / "run"), *chosen, *more]
        )

    done = command("--tensorboard", "--metrics-port", "0")
    assert done.exit_code == 0, done.output
    assert "figures for Prometheus at http://localhost:" in done.stderr
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    assert "--changed goes with --resume" in command("--changed").stderr
    changed = command("--resume", "--changed", "--set", "lr=1e-3")
    assert changed.exit_code == 0, changed.output
    assert "the recipe has another lr from here on" in changed.stderr
