"""Checkpoints: whole or not there at all, verified before use, and enough to go on as if nothing had happened.

    checkpoints/step-N/weights.safetensors     the student as trained (folded where the recipe says so)
                       average.safetensors     the running mean of the weights, where the recipe keeps one
                       optimizer.safetensors   the optimiser's tensors, as "parameter.name"
                       state.json              step, seconds, best score, and sha256 of the other files

No random state is kept, because a run has none: the order of the data, augmentations and the attack's noise are
functions of (seed, step).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pmgaft.errors import CheckpointError, PmgaftError, first_line
from pmgaft.training.spread import fill, whole

KEEP = 2
"""Checkpoints kept; older ones are removed once a newer one is in place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a run is: optimiser steps done, seconds trained, and the best hold-out score with its step."""

    step: int = 0
    seconds: float = 0.0
    best_score: float | None = None
    best_step: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Everything that training goes on from."""

    position: Position
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None = None


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write `directory`/step-N beside its place and rename it there; then remove all but the newest two.

    Raises: PmgaftError where it cannot be written; then nothing of it is left, and what was there before still is.
    """
    target = directory / f"step-{checkpoint.position.step}"
    scratch = directory / f".step-{checkpoint.position.step}.{os.getpid()}"
    with writing(f"the checkpoint of step {checkpoint.position.step}", directory):
        try:
            _write(scratch, checkpoint)
            if target.exists():
                shutil.rmtree(target)
            scratch.rename(target)
            _to_disk(directory)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    for old in _newest_first(directory)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _write(scratch: Path, checkpoint: Checkpoint) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    parts = {"weights": checkpoint.weights, "optimizer": checkpoint.optimizer, "average": checkpoint.average}
    hashes = {}
    for name, tensors in parts.items():
        if tensors is not None:
            path = scratch / f"{name}.safetensors"
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, path)
            hashes[path.name] = _sha256(path)
    state = asdict(checkpoint.position) | {"files": hashes}
    (scratch / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    for path in scratch.iterdir():
        _to_disk(path)


@contextmanager
def writing(what: str, checkpoints: Path) -> Iterator[None]:
    """Turn a failed write of `what` into a PmgaftError that says why, and what to go on from."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise PmgaftError(f"{what} could not be written: {why}; make room, and {advice(checkpoints)}") from error


def advice(checkpoints: Path) -> str:
    """How to go on after a mistake, as the end of a sentence."""
    newest = next(iter(_newest_first(checkpoints)), None)
    if newest is None:
        return "start anew in another --output-dir: there is no checkpoint yet"
    return f"go on with --resume from {newest}, the newest whole checkpoint"


def sweep(directory: Path) -> None:
    """Remove what a process that was killed left half written in a run's directory."""
    for left in [*directory.glob(".*"), *(directory / "checkpoints").glob(".*")]:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def load_newest(directory: Path) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The newest whole checkpoint, or None where there is none at all, and what was wrong with each newer one.

    Raises: CheckpointError, naming each, where there are checkpoints and all of them are damaged.
    """
    refused: list[CheckpointError] = []
    for path in _newest_first(directory):
        try:
            return load_checkpoint(path), refused
        except CheckpointError as error:
            refused.append(error)
    if refused:
        raise CheckpointError(f"no whole checkpoint in {directory}: " + "; ".join(e.message for e in refused))
    return None, []


def load_checkpoint(path: Path) -> Checkpoint:
    """One checkpoint, every file verified against its hash first. Raises: CheckpointError naming the damaged file."""
    state = _read_state(path / "state.json")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, expected in state["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if _sha256(file) != expected:
            raise CheckpointError(f"{file} is damaged (its sha256 is not the recorded one)")
        parts[file.stem] = load_file(file)
    return Checkpoint(
        position=Position(**{name: state[name] for name in Position.__dataclass_fields__}),
        weights=parts["weights"],
        optimizer=parts["optimizer"],
        average=parts.get("average"),
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as flat tensors, whole; its settings come from the recipe. All ranks must ask together."""
    state: dict[int, dict[str, Tensor | None]] = optimizer.state_dict()["state"]
    return {
        f"{parameter}.{name}": whole(value)
        for parameter, tensors in state.items()
        for name, value in tensors.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Undo `optimizer_tensors`: on the parameters' device, in their memory format, each rank its share of them."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        state = value.clone()
        if value.shape == parameter.shape:
            state = torch.empty_like(parameter, requires_grad=False)
            fill(state, value)
        optimizer.state[parameter][name] = state


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = {"files", *Position.__dataclass_fields__} - set(state)
        if missing or not {"weights.safetensors", "optimizer.safetensors"} <= set(state["files"]):
            raise CheckpointError(f"{path} is damaged (entries are missing)")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or damaged") from error
    return state


def _newest_first(directory: Path) -> list[Path]:
    numbered = [(path.name.removeprefix("step-"), path) for path in directory.glob("step-*")]
    return [path for _, path in sorted(((int(n), p) for n, p in numbered if n.isdecimal()), reverse=True)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
