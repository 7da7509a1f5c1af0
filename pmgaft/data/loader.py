"""Endless batches of pixels, the same for the same seed whatever the number of workers. Letters: B batch, H, W size.

Images are decoded in processes of their own and travel as uint8, a quarter of the size of pixels; they become pixels
where they are used.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pmgaft.clip.preprocess import PreprocessSpec, open_image, resize
from pmgaft.data.image_set import ImageSet
from pmgaft.errors import DataError, ImageError, InputError

Augment = Literal["none", "crop-flip", "crop-flip-blur"]

_BATCHES_AHEAD = 2  # of each worker
_SMALLEST_CROP = 0.5  # of the area
_ASPECT = 4 / 3
_BLUR_SHARE = 0.5
_LARGEST_SHRINK = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One batch, or one rank's part of it.

    images: uint8 [B, 3, H, W], channels last in memory. labels, indices (rows of the set): int64 [B]. step counts
    from 0. whole: images of the whole batch; first: the place in it of this part's first row; counted: how many of
    these rows are the part, the others being there so that all ranks do the same work.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    epoch: int
    step: int
    whole: int
    first: int
    counted: int

    @property
    def pixels(self) -> Tensor:
        """float32 [B, 3, H, W] in [0, 1], computed where the images are; the same to the last bit on every device."""
        # By a tensor: CUDA would multiply by the rounded inverse of a Python number.
        return self.images.float() / torch.full((), 255.0, device=self.images.device)

    def to(self, device: torch.device) -> Batch:
        """The same on another device; from pinned memory without waiting for it."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            indices=self.indices.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Batch:
        """The same in memory that a GPU copies from by itself; torch's DataLoader calls this."""
        return replace(
            self,
            images=self.images.pin_memory(),
            labels=self.labels.pin_memory(),
            indices=self.indices.pin_memory(),
        )


def loader(
    dataset: ImageSet,
    preprocess: PreprocessSpec,
    *,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = False,
    augment: Augment = "none",
    workers: int = 0,
    start_step: int = 0,
    rank: int = 0,
    ranks: int = 1,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Batches without end, ceil(images / batch_size) an epoch; the last batch of an epoch may be smaller.

    Batch `step` depends on (dataset, preprocess, batch_size, seed, shuffle, augment, step) alone: a run that stopped
    goes on with `start_step`, and `workers` (decoding processes; 0 decodes in the caller's) changes no pixel. With
    several ranks each gets its part of every batch, ceil(whole / ranks) rows, and reads no other image.
    augment: "crop-flip" takes half the area or more and mirrors every other image; "crop-flip-blur" also makes every
    other one soft, as a small picture enlarged is.
    pin_memory: batches come in page-locked memory, ready for a copy to a GPU.
    Workers are forked, so that they share the data set: it must hold no open file whose position matters.
    Raises: DataError, naming image and set, for a damaged image; InputError for workers where a system cannot fork.
    """
    plans = _plans(len(dataset), batch_size, seed if shuffle else None, start_step)
    if workers and "fork" not in multiprocessing.get_all_start_methods():
        raise InputError("this system cannot fork decoding processes; use workers = 0", field="workers")
    with warnings.catch_warnings():
        # torch warns of more workers than cores, which may be right, and Python of forking beside threads: a worker
        # touches neither torch's threads nor the GPU.
        warnings.simplefilter("ignore")
        batches = iter(
            DataLoader(
                _Read(dataset, preprocess, seed, augment),
                batch_size=None,
                sampler=(plan.part(rank, ranks) for plan in plans),
                num_workers=workers,
                collate_fn=_as_read,
                pin_memory=pin_memory,
                worker_init_fn=_leave_signals_to_the_trainer if workers else None,
                multiprocessing_context="fork" if workers else None,
                prefetch_factor=_BATCHES_AHEAD if workers else None,
                generator=torch.Generator(),  # so that the global one is not drawn from
            )
        )
    try:
        for read in batches:
            if isinstance(read, DataError):
                raise read
            yield read
    finally:
        del batches  # ends the workers now, whoever still holds this frame: a traceback, say


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which images make up one batch, or a part of it: (position in the epoch, index in the set)."""

    epoch: int
    step: int
    rows: Sequence[tuple[int, int]]
    whole: int
    first: int
    counted: int

    def part(self, rank: int, ranks: int) -> _Plan:
        """One rank's part: as many rows for each, filled up from the batch's beginning where it does not divide."""
        share = math.ceil(self.whole / ranks)
        rows = self.rows[rank * share : (rank + 1) * share]
        filled = [*rows, *self.rows[: share - len(rows)]]
        return replace(self, rows=filled, first=rank * share, counted=len(rows))


def _plans(images: int, batch_size: int, shuffle_seed: int | None, start_step: int) -> Iterator[_Plan]:
    steps = math.ceil(images / batch_size)
    for epoch in itertools.count(start_step // steps):
        order: Sequence[int] = range(images)
        if shuffle_seed is not None:
            order = np.random.default_rng([shuffle_seed, epoch]).permutation(images).tolist()
        for step in range(max(start_step, epoch * steps), (epoch + 1) * steps):
            first = (step - epoch * steps) * batch_size
            positions = range(first, min(first + batch_size, images))
            rows = [(position, order[position]) for position in positions]
            yield _Plan(epoch, step, rows, whole=len(rows), first=0, counted=len(rows))


class _Read(Dataset[Batch | DataError]):
    """Plan -> batch: read, decode, augment, resize. A damaged image is handed over, not raised: torch would wrap it."""

    def __init__(self, dataset: ImageSet, preprocess: PreprocessSpec, seed: int, augment: Augment) -> None:
        self.dataset, self.preprocess, self.seed, self.augment = dataset, preprocess, seed, augment

    def __getitem__(self, plan: _Plan) -> Batch | DataError:
        height, width = self.preprocess.size
        images = torch.empty(len(plan.rows), height, width, 3, dtype=torch.uint8)
        labels = torch.empty(len(plan.rows), dtype=torch.int64)
        try:
            for row, (position, index) in enumerate(plan.rows):
                picture, label = self._one(plan.epoch, position, index)
                images[row], labels[row] = torch.from_numpy(picture), label
        except DataError as error:
            return error
        return Batch(
            images=images.permute(0, 3, 1, 2),
            labels=labels,
            indices=torch.tensor([index for _, index in plan.rows]),
            epoch=plan.epoch,
            step=plan.step,
            whole=plan.whole,
            first=plan.first,
            counted=plan.counted,
        )

    def _one(self, epoch: int, position: int, index: int) -> tuple[np.ndarray, int]:
        encoded, label = self.dataset.read(index)
        try:
            image = open_image(encoded)
        except ImageError as error:
            raise DataError(f"image {index} of {self.dataset.name}: {error.message}") from error
        rng = np.random.default_rng([self.seed, epoch, position, 1])
        augmented = _AUGMENT[self.augment](image, self.preprocess, rng)
        return np.array(resize(augmented, self.preprocess), dtype=np.uint8), label


def _as_read(read: Any) -> Any:
    return read


def _leave_signals_to_the_trainer(_: int) -> None:
    """Ctrl-C reaches the whole process group; the trainer finishes its step and then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


_Change = Callable[[Image.Image, PreprocessSpec, np.random.Generator], Image.Image]


def _as_it_is(image: Image.Image, _: PreprocessSpec, __: np.random.Generator) -> Image.Image:
    return image


def _crop_flip(image: Image.Image, spec: PreprocessSpec, rng: np.random.Generator) -> Image.Image:
    """A random crop, resized to the model's size and mirrored every other time. Source: Szegedy et al. 2015."""
    area = image.width * image.height * rng.uniform(_SMALLEST_CROP, 1)
    aspect = math.exp(rng.uniform(-math.log(_ASPECT), math.log(_ASPECT)))
    width = max(1, min(image.width, round(math.sqrt(area * aspect))))
    height = max(1, min(image.height, round(math.sqrt(area / aspect))))
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    crop = image.resize((spec.size[1], spec.size[0]), Image.Resampling.BICUBIC, box=box)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def _crop_flip_blur(image: Image.Image, spec: PreprocessSpec, rng: np.random.Generator) -> Image.Image:
    crop = _crop_flip(image, spec, rng)
    if rng.random() >= _BLUR_SHARE:
        return crop
    shrink = rng.uniform(1, _LARGEST_SHRINK)
    return crop.filter(ImageFilter.GaussianBlur(shrink / 2))


_AUGMENT: dict[Augment, _Change] = {
    "none": _as_it_is,
    "crop-flip": _crop_flip,
    "crop-flip-blur": _crop_flip_blur,
}
