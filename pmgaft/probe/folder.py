"""Many picture files with one question: found, probed in batches, a row each; what cannot be read is a row, too."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pmgaft.data.image_set import IMAGE_SUFFIXES
from pmgaft.errors import DataError, ImageError
from pmgaft.probe.full import Finding, Model, Picture, Question, examine, read_picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One picture file. file: its path below the folder, with "/". truth: the label it lies under, None where there are
    no true labels. document: its report; error: why there is none. picture: what was drawn of it, below the report's
    folder. seconds: its share of the batch's time.
    """

    file: str
    truth: str | None = None
    document: dict[str, Any] | None = None
    error: str | None = None
    picture: str | None = None
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """Of the report; "error" where there is none."""
        return "error" if self.document is None else str(self.document["verdict"])


def picture_files(folder: Path) -> list[Path]:
    """The picture files in a folder and below it, hidden ones left out, in the order of their names.

    Raises: DataError where there are none.
    """
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise DataError(f"{folder} holds no pictures; they end in {', '.join(IMAGE_SUFFIXES)}")
    return files


def true_labels(folder: Path, files: Sequence[Path], labels: Sequence[str]) -> list[str] | None:
    """Each file's label: the name of the sub-folder it lies in, "_" read as space, capitals not told apart.

    None unless every file lies in a sub-folder that names a label: accuracy over some of them would mislead.
    """
    known = {_plain(label): label for label in labels}
    found = []
    for file in files:
        parts = file.relative_to(folder).parts
        label = None
        if len(parts) > 1:
            label = parts[0] if parts[0] in labels else known.get(_plain(parts[0]))
        if label is None:
            return None
        found.append(label)
    return found


def probe_files(
    model: Model,
    folder: Path,
    files: Sequence[Path],
    question: Question,
    device: torch.device,
    *,
    batch_size: int,
) -> Iterator[tuple[Row, Finding | None]]:
    """A row for each file, in order, with what was found; so many are attacked side by side.

    Raises: as `examine`, for what is wrong with the question; what is wrong with a file becomes its row's error.
    """
    truths: Sequence[str | None] = true_labels(folder, files, question.labels) or [None] * len(files)
    for first in range(0, len(files), batch_size):
        batch = files[first : first + batch_size]
        read = [_read(file, model) for file in batch]
        pictures = [one for one in read if isinstance(one, Picture)]
        began = time.monotonic()
        findings = iter(examine(model, pictures, question, device) if pictures else [])
        seconds = (time.monotonic() - began) / max(1, len(pictures))
        for file, truth, one in zip(batch, truths[first:], read, strict=False):
            name = shown_name(file.relative_to(folder))
            if isinstance(one, str):
                yield Row(file=name, truth=truth, error=one), None
            else:
                finding = next(findings)
                yield Row(file=name, truth=truth, document=finding.document, seconds=seconds), finding


def shown_name(path: Path) -> str:
    """A path as text that every file can hold: bytes that are no UTF-8 are replaced."""
    return os.fsencode(path.as_posix()).decode("utf-8", "replace")


def _read(file: Path, model: Model) -> Picture | str:
    """The picture, or why it cannot be read."""
    try:
        return read_picture(file.read_bytes(), model)
    except ImageError as error:
        return error.message
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _plain(name: str) -> str:
    return name.replace("_", " ").strip().casefold()
