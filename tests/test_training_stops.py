"""Runs that are stopped: killed, out of disk, out of numbers. What is there afterwards, and how they go on."""

from __future__ import annotations

import errno
import functools
import multiprocessing
import random
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pmgaft.clip.loading import load_clip
from pmgaft.errors import CheckpointError, PmgaftError
from pmgaft.training import loop, parts
from pmgaft.training.log import read_log
from pmgaft.training.loop import train
from pmgaft.training.recipe import Recipe
from pmgaft.training.step import accumulate_gradients

CPU = torch.device("cpu")
KILLS = 10


@pytest.fixture(autouse=True)
def one_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs share the loaded model, which none of them may change: it is loaded once for all tests."""
    monkeypatch.setattr(parts, "load_clip", _loaded)


_loaded = functools.cache(load_clip)


def recipe(model: Path, data: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": f"local-dir:{model}",
        "data": str(data),
        "epochs": None,
        "steps": 6,
        "batch": 6,
        "lr": 1e-3,
        "checkpoint_every": 2,
        "log_every": 1,
        "objective": {"name": "tecoa"},
    }
    return Recipe.model_validate(values | changes)


def go(what: Recipe, where: Path, *, resume: bool = False, changed: bool = False) -> None:
    train(what, where, device=CPU, resume=resume, changed=changed, report=lambda *_: None)


def weights(where: Path) -> dict[str, Tensor]:
    """The model's, and all that the last checkpoint holds: the model may be an earlier one, which was judged better."""
    files = [where / "model" / "open_clip_model.safetensors"]
    files += sorted((where / "checkpoints" / f"step-{steps(where)[-1]}").glob("*.safetensors"))
    return {f"{file.name}: {name}": value for file in files for name, value in load_file(file).items()}


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def steps(where: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (where / "checkpoints").iterdir())


# Killed


def test_a_run_killed_at_ten_random_moments_ends_as_if_nothing_had_happened(
    tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path
) -> None:
    what = recipe(
        tiny_vit_clip_dir, shards, steps=16, batch=4, checkpoint_every=1, hold_out=0.1, ema=0.5, augment="crop-flip"
    )
    began = time.monotonic()
    go(what, tmp_path / "whole")
    duration = time.monotonic() - began
    moments, killed, cut = random.Random(0), 0, tmp_path / "cut"
    while killed < KILLS:
        process = multiprocessing.get_context("fork").Process(
            target=go, args=(what, cut), kwargs={"resume": (cut / "recipe.toml").is_file()}
        )
        process.start()
        process.join(timeout=moments.uniform(0, duration / 3))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)  # no attempt at going on may fail by itself
        killed += process.exitcode != 0
    go(what, cut, resume=(cut / "recipe.toml").is_file())
    assert same_weights(tmp_path / "whole", cut)
    assert [event["step"] for event in read_log(cut) if event["event"] == "step"] == list(range(1, 17))
    assert not [*cut.glob(".*"), *(cut / "checkpoints").glob(".*")]
    assert (cut / "report.md").is_file()


def test_a_log_line_cut_in_half_is_written_anew(tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path) -> None:
    what = recipe(tiny_vit_clip_dir, shards, steps=2)
    go(what, tmp_path)
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-10])
    go(what, tmp_path, resume=True)
    assert [event["event"] for event in read_log(tmp_path)][-1] == "end"


def test_a_finished_run_that_is_resumed_stays_as_it_is(tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path) -> None:
    what = recipe(tiny_vit_clip_dir, shards, steps=2, checkpoint_every=9, hold_out=0.2)  # its only state is its best
    go(what, tmp_path)
    before, report = weights(tmp_path), (tmp_path / "report.md").read_text()
    go(what, tmp_path, resume=True)
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path).items())
    assert (tmp_path / "report.md").read_text().splitlines()[8:] == report.splitlines()[8:]


# Out of disk


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Every write beyond it fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_and_says_how_to_go_on(
    tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path
) -> None:
    what = recipe(tiny_vit_clip_dir, shards)
    go(what, tmp_path / "whole")
    full = files_no_larger_than(20_000)

    def report(event: str, figures: dict[str, Any]) -> None:
        if event == "step" and figures["step"] == 3:
            full.__enter__()

    try:
        with pytest.raises(PmgaftError) as caught:
            train(what, tmp_path / "cut", device=CPU, resume=False, report=report)
    finally:
        full.__exit__(None, None, None)
    said = caught.value.message
    assert "the checkpoint of step 4 could not be written: " in said
    assert "File too large" in said
    assert f"--resume from {tmp_path / 'cut' / 'checkpoints' / 'step-2'}" in said
    assert steps(tmp_path / "cut") == [2]
    go(what, tmp_path / "cut", resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "cut")


def test_a_model_that_cannot_be_written_leaves_the_one_before(
    tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = recipe(tiny_vit_clip_dir, shards, steps=2)
    go(what, tmp_path)
    before = weights(tmp_path)
    with files_no_larger_than(20_000), pytest.raises(PmgaftError, match=r"the model in .* could not be written: "):
        go(what, tmp_path, resume=True)
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path).items())
    assert not list(tmp_path.glob(".*"))


def test_a_log_that_cannot_be_written_is_named(
    tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop, "write_event", full)
    with pytest.raises(PmgaftError, match=r"log\.jsonl in .* could not be written: No space left.*no checkpoint yet"):
        go(recipe(tiny_vit_clip_dir, shards), tmp_path / "run")


# Out of numbers


def breaking_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From this step on, the loss is no number."""
    calls = iter(range(1, 1000))

    def broken(learner: Any, *args: Any, **options: Any) -> Any:
        if next(calls) == step:
            for parameter in learner.student.parameters():
                parameter.data[...] = torch.inf
        return accumulate_gradients(learner, *args, **options)

    monkeypatch.setattr(loop, "accumulate_gradients", broken)


def test_a_loss_that_is_no_number_stops_with_the_step_the_terms_and_the_checkpoint_to_go_on_from(
    tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = recipe(tiny_vit_clip_dir, shards)
    with monkeypatch.context() as patch:
        breaking_at(4, patch)
        with pytest.raises(PmgaftError) as caught:
            go(what, tmp_path)
    said = caught.value.message
    assert said.startswith("step 4: the loss or its gradient is no longer finite (loss nan, loss_ce nan, gradient norm")
    assert f"go on with --resume from {tmp_path / 'checkpoints' / 'step-2'}" in said
    assert "--changed" in said
    assert steps(tmp_path) == [2]
    calmer = what.model_copy(update={"lr": 1e-4})
    with pytest.raises(CheckpointError, match=r"another lr.*--changed"):
        go(calmer, tmp_path, resume=True)
    go(calmer, tmp_path, resume=True, changed=True)
    (resumed,) = [event for event in read_log(tmp_path) if event["event"] == "resume"]
    assert (resumed["step"], resumed["changed"]) == (2, ["lr"])
    assert steps(tmp_path)[-1] == 6


def test_what_changes_no_result_may_change_on_the_way(tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path) -> None:
    what = recipe(tiny_vit_clip_dir, shards, steps=1)
    go(what, tmp_path)
    go(what.model_copy(update={"workers": 1, "log_every": 5}), tmp_path, resume=True)
