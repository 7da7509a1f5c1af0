"""The pictures on which a format is compared with the original, and those on which int8 scales are measured.

Without a data set of the user's, both come from scikit-image's photographs (the data set "skimage"), of which the
training crops calibrate and the test crops compare. Where scikit-image is missing, too, formats are compared on made-up
shapes, which have no right answer; nothing is calibrated on those.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pmgaft.clip.preprocess import PreprocessSpec
from pmgaft.data import ImageSet, loader, open_dataset
from pmgaft.data.skimage_crops import NAME
from pmgaft.data.subset import Subset
from pmgaft.errors import DataError, InputError

BUILT_IN = NAME
SHAPES = "shapes"
TEXTS = (
    "cat",
    "a photo of a dog.",
    "toaster",
    "a blurry photo of a red bicycle",
    "a",
    "the Eiffel tower at night",
    "a bowl of fruit on a table",
)
CALIBRATION_IMAGES = 64
_BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Pictures, float32 [n, 3, H, W] in [0, 1], and the labels to choose from.

    labels: the right ones, int64 [n]; None where there are none.
    """

    name: str
    pixels: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...]
    templates: tuple[str, ...]


def comparison_sample(preprocess: PreprocessSpec, data: str | None, images: int) -> Sample:
    """At most `images` pictures, drawn from the test split of `data` (as `open_dataset` takes it).

    Raises: DataError if there is no such set.
    """
    try:
        dataset = open_dataset(data or BUILT_IN, "test")
    except DataError:
        if data is not None:
            raise
        pixels = sample_pixels(images, preprocess.size, seed=0)
        return Sample(name=SHAPES, pixels=pixels, labels=None, class_names=TEXTS, templates=("{}",))
    pixels, labels = _read(dataset, preprocess, images)
    return Sample(
        name=dataset.name,
        pixels=pixels,
        labels=labels,
        class_names=dataset.class_names,
        templates=dataset.templates,
    )


def photographs(preprocess: PreprocessSpec, data: str | None) -> Tensor:
    """Pictures to calibrate with, drawn from the training split of `data`, or from the whole of a set without one.

    Raises: DataError if there is no such set; InputError if none is named and none is built in.
    """
    try:
        dataset = _training(data or BUILT_IN)
    except DataError as error:
        if data is not None:
            raise
        message = (
            "onnx-int8 of a convolutional model needs photographs to calibrate with: name a data set of them, or "
            'pip install "pmgaft[demo]"'
        )
        raise InputError(message, field="calibration", code="calibration_missing") from error
    return _read(dataset, preprocess, CALIBRATION_IMAGES)[0]


def sample_pixels(batch: int, size: tuple[int, int], seed: int) -> Tensor:
    """Pixels float32 [B, 3, H, W] in [0, 1]: smooth colour shapes with noise on them, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    shapes = interpolate(torch.rand(batch, 3, 4, 4, generator=generator), size=size, mode="bilinear")
    return 0.7 * shapes + 0.3 * torch.rand(batch, 3, *size, generator=generator)


def _training(data: str) -> ImageSet:
    try:
        return open_dataset(data, "train")
    except DataError:
        return open_dataset(data, "test")


def _read(dataset: ImageSet, preprocess: PreprocessSpec, images: int) -> tuple[Tensor, Tensor]:
    """Pixels and labels of `images` pictures, or all if there are fewer, drawn the same way every time."""
    count = min(images, len(dataset))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    chosen = Subset(dataset, sorted(order[:count].tolist()))
    batches = list(itertools.islice(loader(chosen, preprocess, batch_size=_BATCH), -(-count // _BATCH)))
    return torch.cat([batch.pixels for batch in batches]), torch.cat([batch.labels for batch in batches])
