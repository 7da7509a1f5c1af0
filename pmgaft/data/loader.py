"""Endless batches of pixels, the same for the same seed whatever the number of workers. Letters: B batch, H, W size."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from pmgaft.clip.preprocess import PreprocessSpec, open_image, to_pixels
from pmgaft.data.image_set import ImageSet
from pmgaft.errors import DataError, ImageError

Augment = Literal["none", "crop-flip", "crop-flip-blur"]

_BATCHES_AHEAD = 3
_SMALLEST_CROP = 0.5  # of the area
_ASPECT = 4 / 3
_BLUR_SHARE = 0.5
_LARGEST_SHRINK = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """pixels: float32 [B, 3, H, W] in [0, 1]. labels, indices (rows of the set): int64 [B]. step counts from 0."""

    pixels: Tensor
    labels: Tensor
    indices: Tensor
    epoch: int
    step: int


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
) -> Iterator[Batch]:
    """Batches without end, ceil(images / batch_size) an epoch; the last batch of an epoch may be smaller.

    Batch `step` depends on (dataset, preprocess, batch_size, seed, shuffle, augment, step) alone: a run that stopped
    goes on with `start_step`, and `workers` (decoding threads; 0 decodes in the caller's) changes no pixel.
    augment: "crop-flip" takes half the area or more and mirrors every other image; "crop-flip-blur" also makes every
    other one soft, as a small picture enlarged is.
    Raises: DataError, naming image and set, for a damaged image.
    """
    load = _Load(dataset, preprocess, seed, augment)
    plans = _plans(len(dataset), batch_size, seed if shuffle else None, start_step)
    if workers == 0:
        for plan in plans:
            yield plan.collate([load(plan.epoch, position, index) for position, index in plan.rows])
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="pmgaft-loader")
    waiting: deque[tuple[_Plan, list[Future[_Sample]]]] = deque()
    try:
        for plan in plans:
            waiting.append((plan, [pool.submit(load, plan.epoch, position, index) for position, index in plan.rows]))
            if len(waiting) > _BATCHES_AHEAD:
                first, futures = waiting.popleft()
                yield first.collate([future.result() for future in futures])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_Sample = tuple[Tensor, int]


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which images make up one batch: (position in the epoch, index in the set)."""

    epoch: int
    step: int
    rows: Sequence[tuple[int, int]]

    def collate(self, samples: Sequence[_Sample]) -> Batch:
        return Batch(
            pixels=torch.stack([pixels for pixels, _ in samples]),
            labels=torch.tensor([label for _, label in samples]),
            indices=torch.tensor([index for _, index in self.rows]),
            epoch=self.epoch,
            step=self.step,
        )


def _plans(images: int, batch_size: int, shuffle_seed: int | None, start_step: int) -> Iterator[_Plan]:
    steps = math.ceil(images / batch_size)
    for epoch in itertools.count(start_step // steps):
        order: Sequence[int] = range(images)
        if shuffle_seed is not None:
            order = np.random.default_rng([shuffle_seed, epoch]).permutation(images).tolist()
        for step in range(max(start_step, epoch * steps), (epoch + 1) * steps):
            first = (step - epoch * steps) * batch_size
            positions = range(first, min(first + batch_size, images))
            yield _Plan(epoch, step, [(position, order[position]) for position in positions])


@dataclass(frozen=True, slots=True)
class _Load:
    """One image: read, decode, augment, to pixels."""

    dataset: ImageSet
    preprocess: PreprocessSpec
    seed: int
    augment: Augment

    def __call__(self, epoch: int, position: int, index: int) -> _Sample:
        encoded, label = self.dataset.read(index)
        try:
            image = open_image(encoded)
        except ImageError as error:
            raise DataError(f"image {index} of {self.dataset.name}: {error.message}") from error
        rng = np.random.default_rng([self.seed, epoch, position, 1])
        return to_pixels(_AUGMENT[self.augment](image, self.preprocess, rng), self.preprocess), label


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
