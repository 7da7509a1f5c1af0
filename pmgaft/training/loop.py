"""A whole run: from a recipe to a directory that holds a trained model, and back into the middle of it after a stop.

RUN/recipe.toml           the recipe as resolved
RUN/log.jsonl             one JSON object a line: start, step, judged, checkpoint, resume, end
RUN/checkpoints/step-N/   see pmgaft.training.checkpoint
RUN/model/                the trained model in open_clip's local-dir form
RUN/report.md             what was done and what came out
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from pmgaft.attacks import Budget
from pmgaft.clip.image import PixelEncoder, fold_batchnorm, freeze, frozen_copy
from pmgaft.clip.loading import Clip, load_clip, save_local_dir, tensors_hash
from pmgaft.clip.preprocess import PreprocessSpec
from pmgaft.clip.text import label_features
from pmgaft.data import ImageSet, loader, open_dataset
from pmgaft.data.subset import Subset
from pmgaft.errors import CheckpointError, InputError, PmgaftError, RecipeError
from pmgaft.evaluation.run import Protocol, judge, nothing_in_place
from pmgaft.threat import ThreatModel
from pmgaft.training.checkpoint import (
    Checkpoint,
    Position,
    load_newest,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from pmgaft.training.folding import unfold_batchnorm
from pmgaft.training.recipe import Recipe, load_recipe
from pmgaft.training.report import write_report
from pmgaft.training.schedule import Length, ramp, rate
from pmgaft.training.step import Learner, Measured, accumulate_gradients, frozen_view

Report = Callable[[str, dict[str, Any]], None]
"""Told every event of a run: its name and its figures, the same that log.jsonl gets."""

_JUDGE_BATCH = 32
_JUDGE_STEPS = 10


def train(recipe: Recipe, output_dir: Path, *, device: torch.device, resume: bool, report: Report) -> Path:
    """Carry out a recipe; with `resume`, go on from the newest whole checkpoint. Returns the model's directory.

    After a stop by Ctrl-C a checkpoint has been written. The same recipe, seed, device and thread count give the same
    weights, stopped and resumed or not (but for `minutes`).
    Raises: InputError if `output_dir` holds a run and `resume` is off; CheckpointError if it holds another recipe's
    run; PmgaftError if the loss is no longer finite.
    """
    _refuse(output_dir, recipe, resume)

    def tell(event: str, figures: dict[str, Any]) -> None:
        with (output_dir / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps({"event": event, "time": round(time.time(), 3)} | figures) + "\n")
        report(event, figures)

    run = _Run(recipe, output_dir, device, tell)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    run.start(resume)
    with _interrupts() as interrupted:
        run.all_steps(interrupted)
    return run.finish()


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets an event, so that no update is cut in half; a second Ctrl-C stops at once, as always."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers in no other thread
        yield event
        return

    def handle(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def split(dataset: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """(training part, hold-out part) of a training set: a seeded shuffle, the same for every run with this seed."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    held = round(share * len(dataset))
    return Subset(dataset, sorted(order[held:])), Subset(dataset, sorted(order[:held]))


def guide_words(where: str, class_names: Sequence[str]) -> list[str]:
    """The texts that the guide speaks over: "classes", a shipped word list's name, or a file with one text a line."""
    if where == "classes":
        return list(class_names)
    shipped = resources.files("pmgaft") / "data" / f"{where}.txt"
    source = shipped if shipped.is_file() else Path(where)
    if not source.is_file():
        raise RecipeError(f"objective.guide_texts: neither a word list nor a file: {where!r}")
    words = [line.strip() for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(words) < 2:
        raise RecipeError(f"objective.guide_texts: {where} has fewer than two texts")
    return words


def build_optimizer(recipe: Recipe, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The recipe's optimiser; weight decay is for matrices and kernels, not for biases and norms."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
    return torch.optim.AdamW(groups, lr=recipe.lr)


@dataclass(frozen=True, slots=True)
class _Moment:
    """What the schedules say about one step."""

    rate: float
    eps: float
    step_size: float | None


class _Run:
    """One run's parts; each is built once, in the order of the constructor."""

    def __init__(self, recipe: Recipe, directory: Path, device: torch.device, tell: Report) -> None:
        self.recipe, self.directory, self.device, self.tell = recipe, directory, device, tell
        self.clip = load_clip(recipe.model, recipe.pretrained, device)
        self.guide = _guide(recipe, self.clip, device)
        self.preprocess = _training_preprocess(recipe, self.clip)
        whole = open_dataset(recipe.data, "train")
        if len(whole.class_names) < 2:
            raise InputError(f"{recipe.data} has fewer than two classes; there is nothing to tell apart")
        self.training_set, self.held_out = split(whole, recipe.hold_out, recipe.seed)
        if not len(self.training_set):
            raise InputError(f"{recipe.data} has no training images")
        self.length = Length(steps=self._steps(), minutes=recipe.minutes)
        self.learner = self._learner(self.clip)
        self.average = frozen_copy(self.learner.student) if recipe.ema is not None else None
        parameters = list(self.learner.student.parameters())
        self.optimizer = build_optimizer(recipe, parameters)
        self.parameters = parameters
        self.position = Position()
        self.began = time.monotonic()

    def _steps(self) -> int | None:
        recipe, per_epoch = self.recipe, math.ceil(len(self.training_set) / self.recipe.batch)
        if recipe.epochs is not None:
            return max(1, round(recipe.epochs * per_epoch))
        if recipe.images is not None:
            return math.ceil(recipe.images / recipe.batch)
        return recipe.steps

    def _learner(self, clip: Clip) -> Learner:
        recipe = self.recipe
        prepare = fold_batchnorm if recipe.fold_batchnorm else copy.deepcopy
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        student = nothing_in_place(prepare(clip.image).eval().requires_grad_(True).to(memory_format=layout))
        guide = freeze(prepare(self.guide.image)).to(memory_format=layout)
        class_names = self.training_set.class_names
        templates = recipe.train_templates or self.training_set.templates
        texts = label_features(clip.text.encode, class_names, templates)
        words = guide_words(recipe.objective.guide_texts, class_names)
        scale = recipe.objective.logit_scale
        return Learner(
            student=student,
            attacked=freeze(frozen_view(student)),
            guide=guide,
            objective=recipe.objective,
            texts=texts,
            guide_texts=texts if words == list(class_names) else label_features(clip.text.encode, words, templates),
            scale=clip.logit_scale if scale == "model" else scale,
        )

    def start(self, resume: bool) -> None:
        """Say what was resolved, or take up where the newest whole checkpoint left."""
        if not resume:
            self.tell("start", self._facts())
            return
        found, refused = load_newest(self.directory / "checkpoints")
        for error in refused:
            self.tell("refused", {"problem": error.message})
        if found:
            self._restore(found)
        self.tell("resume", self._facts() | {"step": self.position.step})

    def _facts(self) -> dict[str, Any]:
        return {
            "model": self.clip.name,
            "model_hash": tensors_hash(self.clip.image),
            "guide": self.guide.name,
            "data": self.training_set.name,
            "data_hash": self.training_set.hash,
            "classes": len(self.training_set.class_names),
            "guide_texts": len(self.learner.guide_texts),
            "images": len(self.training_set),
            "held_out": len(self.held_out),
            "steps": self.length.steps,
            "minutes": self.length.minutes,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def all_steps(self, interrupted: threading.Event) -> None:
        """Until the run's length is reached: read, learn, log, judge and checkpoint.

        Raises: KeyboardInterrupt once `interrupted` is set, after the step at hand and a checkpoint.
        """
        self.began = time.monotonic() - self.position.seconds
        recipe = self.recipe
        for pixels, labels in self._batches(self.training_set, start_step=self.position.step):
            moment = self._moment()
            if moment is None:
                break
            measured = self.one_step(pixels, labels, moment)
            step = self.position.step + 1
            self.position = replace(self.position, step=step, seconds=time.monotonic() - self.began)
            if step % recipe.log_every == 0 or step == 1:
                self.tell("step", self._figures(measured, moment))
            if step % recipe.checkpoint_every == 0 and self._moment() is not None:
                self.judge()
                self.checkpoint()
            if interrupted.is_set():
                self.checkpoint()
                raise KeyboardInterrupt

    def one_step(self, pixels: Tensor, labels: Tensor, moment: _Moment) -> Measured:
        """One update. pixels: float32 [B, 3, H, W] in [0, 1]; labels: int64 [B]."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * moment.rate
        self.optimizer.zero_grad(set_to_none=True)
        first = self.position.step * recipe.batch
        measured = accumulate_gradients(
            self.learner,
            pixels,
            labels,
            [(recipe.seed << 32) + first + i for i in range(len(labels))],
            threat=ThreatModel(norm="linf", eps=moment.eps),
            budget=Budget(
                steps=recipe.attack.steps, step_size=moment.step_size, random_start=recipe.attack.random_start
            ),
            micro_batch=recipe.micro_batch,
        )
        norm = nn.utils.clip_grad_norm_(self.parameters, recipe.clip_norm or math.inf)
        if not math.isfinite(measured.loss) or not math.isfinite(float(norm)):
            raise PmgaftError(
                f"step {self.position.step + 1}: the loss or its gradient is no longer finite, nothing was updated; "
                "lower lr, or lengthen warmup or attack.ramp, and start anew"
            )
        self.optimizer.step()
        if self.average is not None and recipe.ema is not None:
            for running, parameter in zip(self.average.parameters(), self.parameters, strict=True):
                running.lerp_(parameter.detach(), 1 - recipe.ema)
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

    def _figures(self, measured: Measured, moment: _Moment) -> dict[str, Any]:
        return {
            "step": self.position.step,
            "progress": round(self.length.progress(self.position.step, self.position.seconds), 4),
            "loss": measured.loss,
            **{f"loss_{name}": value for name, value in measured.terms.items()},
            "lr": self.recipe.lr * moment.rate,
            "eps": moment.eps,
            "zero_gradient_share": measured.zero_gradient_share,
            "seconds": round(self.position.seconds, 2),
            "images_per_second": round(self.position.step * self.recipe.batch / max(self.position.seconds, 1e-9), 2),
        }

    def _batches(
        self, dataset: ImageSet, *, start_step: int = 0, judging: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        recipe = self.recipe
        batches = loader(
            dataset,
            self.clip.preprocess if judging else self.preprocess,
            batch_size=_JUDGE_BATCH if judging else recipe.batch,
            seed=recipe.seed,
            shuffle=not judging,
            augment="none" if judging else recipe.augment,
            workers=recipe.workers,
            start_step=start_step,
        )
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        count = math.ceil(len(dataset) / _JUDGE_BATCH) if judging else None
        for batch in islice(batches, count):
            yield batch.pixels.to(self.device, memory_format=layout), batch.labels.to(self.device)

    def judge(self) -> None:
        """Clean and robust accuracy on the hold-out part, full eps; the best so far becomes the run's model."""
        if not len(self.held_out):
            return
        outcomes = judge(
            self._kept(),
            self.learner.texts,
            self.learner.scale,
            self._batches(self.held_out, judging=True),
            Protocol(
                threat=ThreatModel(norm="linf", eps=self.recipe.attack.eps),
                budget=Budget(steps=_JUDGE_STEPS),
                seed=self.recipe.seed,
            ),
        )
        clean, robust = (float(part.double().mean()) for part in (outcomes.right, outcomes.robust))
        score, best = (clean + robust) / 2, self.position.best_score
        better = best is None or score > best
        if better:
            self.position = replace(self.position, best_score=score, best_step=self.position.step)
            self._save_model()
        self.tell("judged", {"step": self.position.step, "clean": clean, "robust": robust, "best": better})

    def checkpoint(self) -> None:
        """Everything needed to go on from here."""
        checkpoint = Checkpoint(
            position=self.position,
            weights=self.learner.student.state_dict(),
            optimizer=optimizer_tensors(self.optimizer),
            average=self.average.state_dict() if self.average is not None else None,
        )
        path = save_checkpoint(self.directory / "checkpoints", checkpoint)
        self.tell("checkpoint", {"step": self.position.step, "path": str(path.relative_to(self.directory))})

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.learner.student.load_state_dict(dict(checkpoint.weights))
        restore_optimizer(self.optimizer, checkpoint.optimizer)
        if self.average is not None and checkpoint.average is not None:
            self.average.load_state_dict(dict(checkpoint.average))
        self.position = checkpoint.position

    def finish(self) -> Path:
        """Judge and keep the last state, then write the report."""
        self.judge()
        self.checkpoint()
        if not len(self.held_out):
            self._save_model()
        self.tell("end", {"step": self.position.step, "seconds": round(self.position.seconds, 2)})
        write_report(self.directory, self.recipe)
        return self.directory / "model"

    def _kept(self) -> PixelEncoder:
        """The weights that count: the running mean where there is one, else the student's; without gradients."""
        return self.learner.attacked if self.average is None else self.average

    def _save_model(self) -> None:
        kept = self._kept()
        encoder = unfold_batchnorm(kept, self.clip.image) if self.recipe.fold_batchnorm else kept
        model = copy.deepcopy(self.clip.open_clip_model)
        assert isinstance(model.visual, nn.Module)
        model.visual.load_state_dict(encoder.tower.state_dict())
        save_local_dir(model, self.clip.open_clip_config, self.directory / "model", self.clip.tokenizer)


def _guide(recipe: Recipe, clip: Clip, device: torch.device) -> Clip:
    """Who guides. Its answers are read with the student's text features, so both must share one space."""
    if recipe.guide is None:
        return clip
    guide = load_clip(recipe.guide, device=device)
    if (guide.embed_dim, guide.preprocess) != (clip.embed_dim, clip.preprocess):
        raise RecipeError(f"guide: {recipe.guide} has not the image size and feature space of {recipe.model}")
    return guide


@torch.no_grad()
def _training_preprocess(recipe: Recipe, clip: Clip) -> PreprocessSpec:
    """The model's own, but for the size that the recipe names."""
    if recipe.image_size is None:
        return clip.preprocess
    size = (recipe.image_size, recipe.image_size)
    try:
        clip.image(torch.zeros(1, 3, *size, device=clip.image.mean.device))
    except (RuntimeError, AssertionError):
        height, width = clip.preprocess.size
        raise RecipeError(f"image_size: the tower of {recipe.model} takes {height} x {width} pixels alone") from None
    return replace(clip.preprocess, size=size)


def _differing(one: Recipe, other: Recipe) -> list[str]:
    return [name for name in Recipe.model_fields if getattr(one, name) != getattr(other, name)]


def _refuse(directory: Path, recipe: Recipe, resume: bool) -> None:
    """Nothing of another run is overwritten or continued."""
    file = directory / "recipe.toml"
    if resume:
        if not file.is_file():
            raise InputError(f"{directory} holds no run to resume (no recipe.toml)")
        differing = _differing(load_recipe(str(file)), recipe)
        if differing:
            raise CheckpointError(f"{directory} was started with another {', '.join(differing)}; see {file}")
    elif directory.exists() and any(directory.iterdir()):
        hint = "; go on with --resume, or" if file.is_file() else ";"
        raise InputError(f"{directory} is not empty{hint} name another --output-dir")
