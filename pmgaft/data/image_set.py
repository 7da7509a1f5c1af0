"""What every data set looks like, and what all forms share: class names and a hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

from pmgaft.errors import DataError, first_line

Split = Literal["train", "test"]

CLASSES_FILE = "classes.json"
BENCHMARK_CLASSES_FILE = "classnames.txt"  # of CLIP-benchmark's sets: a name a line
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")

# Beyond this, hashing every byte would take longer than people wait; names and sizes must do.
_HASH_CONTENT_UP_TO = 2 * 2**30


class ImageSet(Protocol):
    """Encoded images with labels, in a fixed order."""

    @property
    def name(self) -> str:
        """Short, for tables."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels."""

    @property
    def templates(self) -> tuple[str, ...]:
        """The prompts for this set, each with one "{}"."""

    @property
    def hash(self) -> str:
        """sha256, in hexadecimal: equal for equal images, labels and class names."""

    def __len__(self) -> int:
        """How many images."""

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded image and its label. Raises: DataError if the storage is damaged. Safe to call from threads."""


@dataclass(frozen=True, kw_only=True)
class StoredImages:
    """An ImageSet over any storage that gives the bytes of image i."""

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    labels: Sequence[int]
    encoded: Callable[[int], bytes]
    fingerprint: Callable[[], str]

    def __post_init__(self) -> None:
        """Refuse what has nothing in it, and labels that no class has."""
        if not self.labels:
            raise DataError(f"the data set {self.name} has no images")
        low, high = min(self.labels), max(self.labels)
        if low < 0 or high >= len(self.class_names):
            raise DataError(f"{self.name} has labels {low} to {high}, but {len(self.class_names)} class names")

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded image and its label."""
        return self.encoded(index), self.labels[index]

    @cached_property
    def hash(self) -> str:
        """sha256 over the stored images, the labels and the class names."""
        digest = hashlib.sha256(self.fingerprint().encode())
        digest.update(json.dumps([list(self.labels), list(self.class_names)]).encode())
        return digest.hexdigest()


def files_hash(files: Iterable[Path]) -> str:
    """sha256 over the files' names, sizes and contents; over names and sizes alone where they exceed 2 GiB together."""
    sizes = [(file, file.stat().st_size) for file in files]
    digest = hashlib.sha256()
    for file, size in sizes:
        digest.update(f"{file.name} {size}\n".encode())
    if sum(size for _, size in sizes) <= _HASH_CONTENT_UP_TO:
        for file, _ in sizes:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def read_class_names(folder: Path) -> tuple[str, ...]:
    """The names in `classes.json`: a list, in label order, of names or of objects with `index` and `name`; else those
    in CLIP-benchmark's `classnames.txt`.

    Raises: DataError if both files are missing or say something else.
    """
    listed = folder / BENCHMARK_CLASSES_FILE
    if listed.is_file() and not (folder / CLASSES_FILE).is_file():
        try:
            return tuple(line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip())
        except (OSError, ValueError) as error:
            raise DataError(f"{listed} cannot be read: {first_line(error)}") from error
    return tuple(entry["name"] for entry in read_classes(folder))


def read_classes(folder: Path) -> list[dict[str, str]]:
    """The entries of `classes.json` in label order, each with at least a `name`; see `read_class_names`."""
    file = folder / CLASSES_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{folder} has no {CLASSES_FILE}, so its classes have no names") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {first_line(error)}") from error
    entries = (
        [{"name": item} if isinstance(item, str) else item for item in content] if isinstance(content, list) else []
    )
    wanted = range(len(entries))
    good = all(isinstance(e, dict) and isinstance(e.get("name"), str) and e["name"].strip() for e in entries)
    if not entries or not good or any(entry.get("index", i) != i for i, entry in zip(wanted, entries, strict=True)):
        raise DataError(f'{file} must be a list, in label order, of names or of {{"index": 0, "name": "cat"}}')
    return entries
