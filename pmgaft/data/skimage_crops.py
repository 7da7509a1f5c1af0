"""A thousand crops of the photographs that scikit-image's wheel carries: real pictures that need no download.

For demonstrations of the way, not of any effect: every class is a single photograph.
"""

from __future__ import annotations

import importlib.util
import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from pmgaft.clip.preprocess import open_image
from pmgaft.data.image_set import Split, StoredImages, files_hash
from pmgaft.data.prompts import templates_for
from pmgaft.errors import DataError

NAME = "skimage"

# file: class name. Left out: drawings, and what tests and examples use (astronaut, camera, chelsea, coffee, rocket).
_PHOTOGRAPHS = {
    "brick.png": "brick wall",
    "cell.png": "cell under a microscope",
    "coins.png": "ancient coin",
    "grass.png": "lawn",
    "gravel.png": "gravel ground",
    "hubble_deep_field.jpg": "galaxy",
    "ihc.png": "stained tissue",
    "moon.png": "moon surface",
    "motorcycle_left.png": "motorcycle",
    "page.png": "printed page",
    "retina.jpg": "retina",
    "text.png": "handwriting",
}
_CROPS = {"train": 84, "test": 20}  # per photograph
_SMALLEST = 96
_LARGEST = 224


def open_skimage(split: Split) -> StoredImages:
    """Square crops, seeded, each 96 pixels or more of its photograph and at most 224 pixels in size, as BMP.

    Raises: DataError if scikit-image is not installed or has lost a picture.
    """
    folder = _folder()
    files = [folder / name for name in _PHOTOGRAPHS]
    for file in files:
        if not file.is_file():
            raise DataError(f"this version of scikit-image does not carry {file.name}; install scikit-image 0.26")
    count = _CROPS[split]

    def encoded(index: int) -> bytes:
        seed = (index, len(files) * (split == "test"))
        return _crop(_photograph(files[index % len(files)]), np.random.default_rng(seed))

    return StoredImages(
        name=NAME,
        class_names=tuple(_PHOTOGRAPHS.values()),
        templates=templates_for(NAME),
        labels=[index % len(files) for index in range(count * len(files))],
        encoded=encoded,
        fingerprint=lambda: f"{split} {files_hash(files)}",
    )


def _folder() -> Path:
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise DataError('the data set "skimage" needs scikit-image: pip install "pmgaft[demo]"')
    return Path(spec.origin).parent / "data"


@cache
def _photograph(file: Path) -> Image.Image:
    return open_image(file)


def _crop(picture: Image.Image, rng: np.random.Generator) -> bytes:
    side = int(rng.integers(_SMALLEST, min(picture.size) + 1))
    left = int(rng.integers(0, picture.width - side + 1))
    top = int(rng.integers(0, picture.height - side + 1))
    crop = picture.crop((left, top, left + side, top + side))
    if side > _LARGEST:
        crop = crop.resize((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    crop.convert("RGB").save(buffer, "BMP")  # a PNG would cost ten times as long
    return buffer.getvalue()
