"""Pictures of a set in parts of bounded size, read ahead while others are judged, on either pixel grid."""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pmgaft.clip.preprocess import PreprocessSpec, open_image, to_pixels
from pmgaft.clip.resizing import resize_for
from pmgaft.data import ImageSet
from pmgaft.errors import DataError, ImageError
from pmgaft.threat import Grid

BATCHES_A_PART = 2
LARGEST_SIDE = 512
"""A native part holds at most the pixels of as many pictures of this side, however large some are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One image. pixels: float32 [3, H, W] in [0, 1], what an attack may change. size: (H, W) before the resize that
    lies between those pixels and the model; pictures of one size can be stacked.
    """

    number: int
    pixels: Tensor
    label: int
    size: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Reads the images of one set as the grid wants them: as the model sees them, or as they were before the resize."""

    images: ImageSet
    preprocess: PreprocessSpec
    grid: Grid

    def __call__(self, number: int) -> Picture:
        """Image `number` of the set. Raises: DataError, naming image and set, for a damaged one."""
        encoded, label = self.images.read(number)
        try:
            image = open_image(encoded)
        except ImageError as error:
            raise DataError(f"image {number} of {self.images.name}: {error.message}") from error
        if self.grid == "model-input":
            size, pixels = self.preprocess.size, to_pixels(image, self.preprocess)
        else:
            size = (image.height, image.width)
            whole = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
            pixels = resize_for(*size, self.preprocess).seen(whole).float().div(255).contiguous()
        return Picture(number=number, pixels=pixels, label=label, size=size)

    def parts(self, numbers: Sequence[int], batch_size: int) -> list[list[int]]:
        """The images cut into parts, the same ones every time: what is judged, and written down, at one go.

        On the native grid pictures of one size come together, since only they share a batch.
        """
        most = BATCHES_A_PART * batch_size
        if self.grid == "model-input":
            return [list(numbers[first : first + most]) for first in range(0, len(numbers), most)]
        sizes = {number: _size(self.images.read(number)[0]) for number in numbers}
        parts: list[list[int]] = [[]]
        room = most * LARGEST_SIDE**2
        for number in sorted(numbers, key=lambda n: (sizes[n], n)):
            area = sizes[number][0] * sizes[number][1]
            if parts[-1] and (len(parts[-1]) == most or area > room):
                parts.append([])
                room = most * LARGEST_SIDE**2
            parts[-1].append(number)
            room -= area
        return parts


def read_ahead(pictures: Pictures, parts: Sequence[Sequence[int]], workers: int) -> Iterator[list[Picture]]:
    """The parts' pictures, in order; the next part is decoded by `workers` threads while the caller works."""
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="pmgaft-pictures") as pool:
        try:
            ahead = [pool.submit(pictures, number) for number in parts[0]] if parts else []
            for following in [*parts[1:], []] if parts else []:
                ready, ahead = ahead, [pool.submit(pictures, number) for number in following]
                yield [future.result() for future in ready]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def by_size(pictures: Sequence[Picture]) -> Iterator[tuple[tuple[int, int], list[Picture]]]:
    """Groups that can be stacked, with their size."""
    groups: dict[tuple[int, int], list[Picture]] = defaultdict(list)
    for picture in pictures:
        groups[picture.size].append(picture)
    yield from groups.items()


def _size(encoded: bytes) -> tuple[int, int]:
    """(width, height) as the header says; (0, 0) where it cannot be read, which is reported when the image is."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(encoded)) as image:
        return image.size
    return 0, 0
