"""A whole run: from a recipe to a directory that holds a trained model, and back into the middle of it after a stop.

RUN/recipe.toml           the recipe as resolved
RUN/log.jsonl             one JSON object a line: start, step, judged, checkpoint, resume, end
RUN/checkpoints/step-N/   see pmgaft.training.checkpoint
RUN/model/                the trained model in open_clip's local-dir form
RUN/visual.safetensors    its image tower alone
RUN/report.md             what was done and what came out

Under torchrun every rank runs all of this on its part of each batch; the first one writes and speaks.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from pmgaft.attacks import Budget
from pmgaft.clip.loading import tensors_hash
from pmgaft.data import Batch, duplicate_names, loader
from pmgaft.data.subset import Subset
from pmgaft.device import float32_products
from pmgaft.errors import CheckpointError, InputError
from pmgaft.ranks import Ranks, joined
from pmgaft.threat import ThreatModel
from pmgaft.training.checkpoint import (
    Checkpoint,
    Position,
    advice,
    load_newest,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
    sweep,
    writing,
)
from pmgaft.training.judging import right_answers
from pmgaft.training.log import mend, write_event
from pmgaft.training.outputs import save_model
from pmgaft.training.parts import build
from pmgaft.training.recipe import Recipe, load_recipe
from pmgaft.training.report import write_report
from pmgaft.training.schedule import Length, ramp, rate
from pmgaft.training.spread import fill, whole
from pmgaft.training.step import Measured, Part, accumulate_gradients
from pmgaft.training.watch import Watch

Report = Callable[[str, dict[str, Any]], None]
"""Told every event of a run: its name and its figures, the same that log.jsonl gets."""

_CHANGE_NO_RESULT = {"workers", "log_every"}
_ONE_CTRL_C = 1.0
"""Seconds in which a second signal is the first one's echo: torchrun passes on what the terminal sends to all."""


def train(
    recipe: Recipe,
    output_dir: Path,
    *,
    device: torch.device,
    resume: bool,
    report: Report,
    changed: bool = False,
) -> Path:
    """Carry out a recipe; with `resume`, go on from the newest whole checkpoint. Returns the model's directory.

    After a stop by Ctrl-C or SIGTERM a checkpoint has been written. The same recipe, seed, device and thread count give
    the same weights, stopped and resumed or not (but for `minutes`). changed: go on even with another recipe.
    Raises: InputError if `output_dir` holds a run and `resume` is off; CheckpointError if it holds another recipe's
    run; PmgaftError if the loss is no longer finite, or the run cannot be written.
    """
    with joined(device) as (ranks, own_device), float32_products(tf32=recipe.tf32):
        changes = ranks.by_first(lambda: _refuse(output_dir, recipe, resume=resume, changed=changed))
        run = _Run(recipe, output_dir, own_device, ranks, report)
        with run.writing("the run"):
            if ranks.first:
                output_dir.mkdir(parents=True, exist_ok=True)
                sweep(output_dir)
                mend(output_dir)
                scratch = output_dir / ".recipe.toml"
                scratch.write_text(recipe.to_toml(), encoding="utf-8")
                os.replace(scratch, output_dir / "recipe.toml")
        run.start(resume, changes)
        with _interrupts() as interrupted:
            run.all_steps(interrupted)
        return run.finish()


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Ctrl-C or SIGTERM sets an event, so that no update is cut in half; a second one stops at once, as always."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers in no other thread
        yield event
        return
    told = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal told
        if event.is_set() and time.monotonic() - told > _ONE_CTRL_C:
            raise KeyboardInterrupt
        if not event.is_set():
            told = time.monotonic()
            event.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True, slots=True)
class _Moment:
    """What the schedules say about one step."""

    rate: float
    eps: float
    step_size: float | None


class _Run:
    """One run on its way."""

    def __init__(self, recipe: Recipe, directory: Path, device: torch.device, ranks: Ranks, report: Report) -> None:
        self.recipe, self.directory, self.device, self.ranks, self.report = recipe, directory, device, ranks, report
        self.parts = build(recipe, device, ranks)
        self.parameters: list[Tensor] = list(self.parts.learner.student.parameters())
        self.layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.length = Length(steps=self._steps(), minutes=recipe.minutes)
        self.watch = Watch(lambda: advice(directory / "checkpoints") + " and --changed")
        self.position = Position()
        self.saved: Position | None = None
        self.began = self.spoke = time.monotonic()
        self.spoke_at = 0

    def _steps(self) -> int | None:
        recipe, per_epoch = self.recipe, math.ceil(len(self.parts.training_set) / self.recipe.batch)
        if recipe.epochs is not None:
            return max(1, round(recipe.epochs * per_epoch))
        if recipe.images is not None:
            return math.ceil(recipe.images / recipe.batch)
        return recipe.steps

    def tell(self, event: str, figures: dict[str, Any]) -> None:
        """Log and report an event; the first rank's part."""
        if self.ranks.first:
            with self.writing("log.jsonl"):
                write_event(self.directory, event, figures)
            self.report(event, figures)

    def writing(self, what: str) -> contextlib.AbstractContextManager[None]:
        """A failed write says what to go on from."""
        return writing(f"{what} in {self.directory}", self.directory / "checkpoints")

    def start(self, resume: bool, changes: list[str]) -> None:
        """Say what was resolved, or take up where the newest whole checkpoint left."""
        if not resume:
            self.tell("start", self._facts())
            return
        found, refused = load_newest(self.directory / "checkpoints")
        for error in refused:
            self.tell("refused", {"problem": error.message})
        if found:
            self._restore(found)
        self.tell("resume", self._facts() | {"step": self.position.step, "changed": changes})

    def _facts(self) -> dict[str, Any]:
        parts, recipe, names = self.parts, self.recipe, self.parts.training_set.class_names
        return {
            "model": parts.clip.name,
            "model_hash": tensors_hash(parts.clip.image),
            "guide": parts.guide_name,
            "data": parts.training_set.name,
            "data_hash": parts.training_set.hash,
            "classes": len(names),
            "same_names": [names[group[0]] for group in duplicate_names(names)],
            "guide_texts": len(parts.learner.guide_texts),
            "images": len(parts.training_set),
            "held_out": len(parts.held_out),
            "steps": self.length.steps,
            "minutes": self.length.minutes,
            "device": _name(self.device),
            "ranks": self.ranks.world,
            "precision": recipe.precision,
            "attack_precision": recipe.attack.precision,
            "tf32": recipe.tf32,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def all_steps(self, interrupted: threading.Event) -> None:
        """Until the run's length is reached: read, learn, log, judge and checkpoint.

        Raises: KeyboardInterrupt once `interrupted` is set at any rank, after the step at hand and a checkpoint.
        """
        self.began = time.monotonic() - self.position.seconds
        self._speak_from_here()
        recipe = self.recipe
        for batch in self._batches():
            moment = self._moment()
            if moment is None:
                break
            step = self.position.step + 1
            logged = step % recipe.log_every == 0 or step == 1
            measured = self.one_step(batch, moment, with_accuracy=logged)
            self.position = replace(self.position, step=step, seconds=self._elapsed())
            if logged:
                self.watch.settle()
                self.tell("step", self._figures(measured, moment))
                self._speak_from_here()
            if step % recipe.checkpoint_every == 0 and self._moment() is not None:
                self.judge()
                self.checkpoint()
                self._speak_from_here()
            if self.ranks.any(interrupted.is_set()):
                self.checkpoint()
                raise KeyboardInterrupt

    def _elapsed(self) -> float:
        """Seconds trained; where the clock decides what is done, the same for all ranks."""
        seconds = time.monotonic() - self.began
        return seconds if self.recipe.minutes is None else self.ranks.largest(seconds)

    def one_step(self, batch: Batch, moment: _Moment, *, with_accuracy: bool) -> Measured:
        """One update, on this rank's part of a batch."""
        recipe, learner, optimizer = self.recipe, self.parts.learner, self.parts.optimizer
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * moment.rate
        optimizer.zero_grad(set_to_none=True)
        first = self.position.step * recipe.batch + batch.first
        measured = accumulate_gradients(
            learner,
            batch.pixels.contiguous(memory_format=self.layout),
            batch.labels,
            [(recipe.seed << 32) + first + i for i in range(len(batch.labels))],
            threat=ThreatModel(norm="linf", eps=moment.eps),
            budget=Budget(
                steps=recipe.attack.steps, step_size=moment.step_size, random_start=recipe.attack.random_start
            ),
            micro_batch=recipe.micro_batch,
            part=Part(whole=batch.whole, counted=batch.counted, ranks=self.ranks.world),
            with_accuracy=with_accuracy,
        )
        measured = replace(measured, values=self.ranks.total(measured.values))
        if recipe.clip_norm is None:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        else:
            norm = nn.utils.clip_grad_norm_(self.parameters, recipe.clip_norm)
        self.watch.look(self.position.step + 1, measured, whole(norm))
        optimizer.step()
        if recipe.ema is not None and self.parts.average is not None:
            weight = newest_weight(recipe.ema, self.position.step + 1)
            with torch.no_grad():
                torch._foreach_lerp_(self.parts.average, self.parameters, weight)
        return measured

    def _moment(self) -> _Moment | None:
        """The schedules at the current position; None once the run is over."""
        recipe, position = self.recipe, self.position
        progress = self.length.progress(position.step, position.seconds)
        if progress >= 1:
            return None
        # Half a step ahead: the first step of a warm-up or ramp would otherwise have rate or eps 0 and teach nothing.
        ahead = min(progress + 0.5 / self.length.steps, 1.0) if self.length.steps else progress
        factor = ramp(ahead, recipe.attack.ramp)
        step_size = recipe.attack.step_size
        return _Moment(
            rate=rate(ahead, warmup=recipe.warmup, shape=recipe.schedule),
            eps=recipe.attack.eps * factor,
            step_size=step_size * factor if step_size and factor else None,
        )

    def _speak_from_here(self) -> None:
        """Judging and writing are not training: the next images a second are counted from now on."""
        self.spoke, self.spoke_at = time.monotonic(), self.position.step

    def _figures(self, measured: Measured, moment: _Moment) -> dict[str, Any]:
        position = self.position
        progress = self.length.progress(position.step, position.seconds)
        done, took = position.step - self.spoke_at, time.monotonic() - self.spoke
        return {
            "step": position.step,
            "progress": round(progress, 4),
            **measured.figures(),
            "lr": self.recipe.lr * moment.rate,
            "eps": moment.eps,
            "seconds": round(position.seconds, 2),
            "seconds_left": round(position.seconds * (1 / progress - 1), 1),
            "images_per_second": round(done * self.recipe.batch / max(took, 1e-9), 2),
        }

    def _batches(self) -> Iterator[Batch]:
        recipe = self.recipe
        batches = loader(
            self.parts.training_set,
            self.parts.preprocess,
            batch_size=recipe.batch,
            seed=recipe.seed,
            shuffle=True,
            augment=recipe.augment,
            workers=recipe.workers,
            start_step=self.position.step,
            rank=self.ranks.rank,
            ranks=self.ranks.world,
            pin_memory=self.device.type == "cuda",
        )
        for batch in batches:
            yield batch.to(self.device)

    def judge(self) -> None:
        """Clean and robust accuracy on the hold-out part, full eps; the best so far becomes the run's model."""
        held_out = self.parts.held_out
        if not len(held_out):
            return
        self.watch.settle()
        kept, learner = self.parts.kept(), self.parts.learner
        threat = ThreatModel(norm="linf", eps=self.recipe.attack.eps)
        with float32_products(tf32=False):
            counts = right_answers(kept, learner.texts, learner.scale, self._held_out_batches(), threat)
        clean, robust = (self.ranks.total(counts) / len(held_out)).tolist()
        score, position = (clean + robust) / 2, self.position
        if position.best_score is None or score > position.best_score:
            self.position = replace(position, best_score=score, best_step=position.step)
        best = self.position.best_step == position.step
        if best:
            self._save_model()
        self.tell("judged", {"step": position.step, "clean": clean, "robust": robust, "best": best})

    def _held_out_batches(self) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        """This rank's share of the hold-out part; an image's seed is its number there."""
        recipe, size = self.recipe, self.recipe.micro_batch
        own = range(self.ranks.rank, len(self.parts.held_out), self.ranks.world)
        batches = loader(
            Subset(self.parts.held_out, own), self.parts.clip.preprocess, batch_size=size, workers=recipe.workers
        )
        for batch in islice(batches, math.ceil(len(own) / size)):
            seeds = [recipe.seed + own[index] for index in batch.indices.tolist()]
            there = batch.to(self.device)
            yield there.pixels.contiguous(memory_format=self.layout), there.labels, seeds

    def checkpoint(self) -> None:
        """Everything needed to go on from here, unless it is there already."""
        self.watch.settle()
        if self.saved is not None and replace(self.saved, seconds=0.0) == replace(self.position, seconds=0.0):
            return
        parts = self.parts
        average = None
        if parts.average is not None:
            names = [name for name, _ in parts.learner.student.named_parameters()]
            average = {name: whole(tensor) for name, tensor in zip(names, parts.average, strict=True)}
        checkpoint = Checkpoint(
            position=self.position,
            weights={name: whole(tensor) for name, tensor in parts.learner.student.state_dict().items()},
            optimizer=optimizer_tensors(parts.optimizer),
            average=average,
        )
        self.saved = self.position
        if self.ranks.first:
            path = save_checkpoint(self.directory / "checkpoints", checkpoint)
            self.tell("checkpoint", {"step": self.position.step, "path": str(path.relative_to(self.directory))})

    def _restore(self, checkpoint: Checkpoint) -> None:
        parts = self.parts
        state = parts.learner.student.state_dict()
        if state.keys() != checkpoint.weights.keys():
            raise CheckpointError(f"the checkpoint of step {checkpoint.position.step} is another model's")
        for name, tensor in state.items():
            fill(tensor, checkpoint.weights[name])
        restore_optimizer(parts.optimizer, checkpoint.optimizer)
        if parts.average is not None:
            average = checkpoint.average or checkpoint.weights
            for (name, _), tensor in zip(parts.learner.student.named_parameters(), parts.average, strict=True):
                fill(tensor, average[name])
        self.position = self.saved = checkpoint.position

    def finish(self) -> Path:
        """Judge and keep the last state, then write the report."""
        self.judge()
        self.checkpoint()
        if not len(self.parts.held_out):
            self._save_model()
        self.tell("end", {"step": self.position.step, "seconds": round(self.position.seconds, 2)})
        if self.ranks.first:
            with self.writing("report.md"):
                write_report(self.directory, self.recipe)
        return self.directory / "model"

    def _save_model(self) -> None:
        kept = self.parts.kept()
        if self.ranks.first:
            with self.writing("the model"):
                save_model(self.directory, kept, self.parts.clip, folded=self.recipe.fold_batchnorm)


def newest_weight(decay: float, step: int) -> float:
    """What the newest weights count in their running mean after `step` steps, so that those of k steps ago count
    decay^k and the start, which was not trained, nothing. Source: Kingma and Ba 2015, section 3 (bias correction).
    """
    return (1 - decay) / (1 - decay**step)


def _name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _differing(one: Recipe, other: Recipe) -> list[str]:
    return [name for name in Recipe.model_fields if getattr(one, name) != getattr(other, name)]


def _refuse(directory: Path, recipe: Recipe, *, resume: bool, changed: bool) -> list[str]:
    """Nothing of another run is overwritten or continued. Gives the settings that differ from those of the run."""
    file = directory / "recipe.toml"
    if resume:
        if not file.is_file():
            raise InputError(f"{directory} holds no run to resume (no recipe.toml)")
        differing = _differing(load_recipe(str(file)), recipe)
        refused = [name for name in differing if name not in _CHANGE_NO_RESULT]
        if refused and not changed:
            message = f"{directory} was started with another {', '.join(refused)}; see {file}, or add --changed"
            raise CheckpointError(message)
        return differing
    if directory.exists() and any(not path.name.startswith(".") for path in directory.iterdir()):
        hint = "; go on with --resume, or" if file.is_file() else ";"
        raise InputError(f"{directory} is not empty{hint} name another --output-dir")
    return []
