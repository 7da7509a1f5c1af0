"""Training by several processes: what they do together is what one alone would have done."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # here, so that every forked rank has it already
from safetensors.torch import load_file
from torch import Tensor

from pmgaft.errors import InputError
from pmgaft.training.log import read_log
from pmgaft.training.loop import train
from pmgaft.training.recipe import Recipe

CPU = torch.device("cpu")


def recipe(model: Path, data: Path, **changes: Any) -> Recipe:
    """36 images in batches of 7: the last batch of the epoch has one image, so that one of two ranks has none."""
    values: dict[str, Any] = {
        "model": f"local-dir:{model}",
        "data": str(data),
        "epochs": 1,
        "batch": 7,
        "micro_batch": 3,
        "lr": 0.01,
        "optimizer": "sgd",
        "warmup": 0.2,
        "hold_out": 0.25,
        "checkpoint_every": 3,
        "log_every": 1,
        "objective": {"reduction": "sum", "gamma": 0.5, "logit_scale": 10.0},
    }
    return Recipe.model_validate(values | changes)


SHORT = {"epochs": None, "steps": 3, "checkpoint_every": 2, "hold_out": 0.0}


def go(what: Recipe, where: Path, *, resume: bool = False, report: Callable[..., None] = lambda *_: None) -> None:
    train(what, where, device=CPU, resume=resume, report=report)


def together(work: Callable[[], None], ranks: int = 2) -> list[int | None]:
    """The work, done by several processes as torchrun would start them; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    processes = [
        context.Process(target=_as_rank, args=(work, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    return [process.exitcode for process in processes]


def _as_rank(work: Callable[[], None], variables: dict[str, str]) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    work()


def weights(where: Path) -> dict[str, Tensor]:
    """The model's, and those of the last step: the model may be that of an earlier one, which was judged better."""
    last = max((where / "checkpoints").iterdir(), key=lambda path: int(path.name.removeprefix("step-")))
    files = [where / "model" / "open_clip_model.safetensors", last / "weights.safetensors"]
    return {f"{last.name}, {file.name}: {name}": value for file in files for name, value in load_file(file).items()}


def log_of(where: Path, event: str) -> list[dict[str, Any]]:
    return [found for found in read_log(where) if found["event"] == event]


def assert_same(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=2e-6, msg=name)
    for event, keys in {
        "step": ("loss", "loss_ce", "clean_accuracy", "robust_accuracy", "zero_gradient_share"),
        "judged": ("clean", "robust"),
    }.items():
        for ours_event, theirs_event in zip(log_of(one, event), log_of(other, event), strict=True):
            assert ours_event["step"] == theirs_event["step"]
            assert [ours_event[key] for key in keys] == pytest.approx([theirs_event[key] for key in keys], rel=1e-3)


@pytest.mark.parametrize(
    "changes",
    [{}, {"sharding": "full", "ema": 0.5}, {"sharding": "full", "objective": {"name": "tga-zsr"}, **SHORT}],
    ids=["a copy on each", "a share on each", "tokens"],
)
def test_two_processes_with_half_the_batch_each_give_the_weights_of_one(
    changes: dict[str, Any], tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path
) -> None:
    what = recipe(tiny_vit_clip_dir, shards, **changes)
    go(what, tmp_path / "one")
    assert together(lambda: go(what, tmp_path / "two")) == [0, 0]
    assert_same(tmp_path / "two", tmp_path / "one")
    (start,) = log_of(tmp_path / "two", "start")  # one of the two speaks
    assert start["ranks"] == 2


def test_shares_that_were_killed_and_resumed_give_the_same_weights(
    tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path
) -> None:
    what = recipe(tiny_vit_clip_dir, shards, sharding="full", optimizer="adamw", ema=0.5, **SHORT)

    def killed(event: str, figures: dict[str, Any]) -> None:
        if event == "step" and figures["step"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    assert together(lambda: go(what, tmp_path / "whole")) == [0, 0]
    codes = together(lambda: go(what, tmp_path / "cut", report=killed))
    assert codes[0] == -signal.SIGKILL
    assert codes[1] not in (0, None)  # the other one does not wait for ever
    assert together(lambda: go(what, tmp_path / "cut", resume=True)) == [0, 0]
    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_one_process_goes_on_with_what_two_have_begun(tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path) -> None:
    what = recipe(tiny_vit_clip_dir, shards, sharding="full", **SHORT)
    go(what, tmp_path / "one")
    assert together(lambda: go(what, tmp_path / "two")) == [0, 0]
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-3")
    go(what, tmp_path / "two", resume=True)
    assert_same(tmp_path / "two", tmp_path / "one")


def test_a_signal_to_any_rank_stops_all_of_them_at_one_checkpoint(
    tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path
) -> None:
    what = recipe(tiny_vit_clip_dir, shards, **(SHORT | {"checkpoint_every": 100}))
    go(what, tmp_path / "one")

    def run() -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGALRM)
        with pytest.raises(KeyboardInterrupt):
            go(what, tmp_path / "two")

    def forward(*_: Any) -> None:
        """Rank 1 hears of it as soon as it listens."""
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGALRM, forward)
    try:
        assert together(run) == [0, 0]
    finally:
        signal.signal(signal.SIGALRM, before)
    (stopped,) = (tmp_path / "two" / "checkpoints").iterdir()
    assert stopped.name == "step-1"
    assert together(lambda: go(what, tmp_path / "two", resume=True)) == [0, 0]
    assert_same(tmp_path / "two", tmp_path / "one")


def test_a_run_that_may_not_start_is_refused_by_every_rank(
    tiny_vit_clip_dir: Path, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("x")

    def run() -> None:
        with pytest.raises(InputError, match="is not empty"):
            go(recipe(tiny_vit_clip_dir, shards), tmp_path / "run")

    assert together(run) == [0, 0]
