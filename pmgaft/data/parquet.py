"""Parquet files with the columns `image` and `label`.

`image` holds encoded files, as binary or, in Hugging Face's sets, as a struct with `bytes`. The class names are in
classes.json beside the files, or in the files as Hugging Face's sets have them.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pmgaft.data.image_set import CLASSES_FILE, StoredImages, files_hash, read_class_names
from pmgaft.data.prompts import Prompts, templates_for
from pmgaft.errors import DataError, first_line

IN_MEMORY_UP_TO = 2 * 2**30
"""Bytes of all files together. Larger sets are read row group by row group."""

_GROUPS_KEPT = 8
"""Row groups that a process keeps of a set that it does not hold whole."""


@dataclass(frozen=True, slots=True)
class _Group:
    """One row group of one file, and the number in the set of its first row."""

    file: Path
    metadata: pq.FileMetaData
    number: int
    first: int


def open_parquet(files: Sequence[Path], folder: Path, prompts: Prompts) -> StoredImages:
    """The rows of `files`, one after the other. folder: has classes.json, if any, and its name is the set's.

    Sets of up to 2 GiB are held in memory, which workers that are forked share. Of larger ones each process keeps the
    last few row groups it read: quick in order, slow when shuffled (webdataset shards are quick in any order).
    Raises: DataError, naming the file, for a damaged one.
    """
    groups: list[_Group] = []
    labels: list[int] = []
    for file in files:
        metadata = _metadata(file)
        for number in range(metadata.num_row_groups):
            groups.append(_Group(file, metadata, number, len(labels)))
            labels += _column(groups[-1], "label").to_pylist()
    firsts = [group.first for group in groups]
    whole = sum(file.stat().st_size for file in files) <= IN_MEMORY_UP_TO

    @lru_cache(maxsize=None if whole else _GROUPS_KEPT)
    def images(place: int) -> pa.ChunkedArray:
        return _column(groups[place], "image")

    if whole:
        for place in range(len(groups)):
            images(place)

    def encoded(index: int) -> bytes:
        place = bisect_right(firsts, index) - 1
        content: bytes = images(place)[index - firsts[place]].as_py()
        return content

    name = folder.resolve().name
    return StoredImages(
        name=name,
        class_names=_class_names(folder, groups),
        templates=templates_for(name, folder, prompts),
        labels=labels,
        encoded=encoded,
        fingerprint=lambda: files_hash(files),
    )


def _metadata(file: Path) -> pq.FileMetaData:
    with _reading(file):
        return pq.read_metadata(file)


def _column(group: _Group, name: str) -> pa.ChunkedArray:
    """One column of one row group: images as large_binary, labels as int64."""
    with _reading(group.file):
        with pq.ParquetFile(group.file, metadata=group.metadata) as opened:
            column = opened.read_row_group(group.number, columns=[name])[name]
        if pa.types.is_struct(column.type):
            column = pa.chunked_array([chunk.field("bytes") for chunk in column.chunks], pa.binary())
        column = column.cast(pa.int64() if name == "label" else pa.large_binary())
    if column.null_count:
        raise DataError(f"{group.file} has rows without image or label")
    return column


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{file} is damaged or not of the form image, label: {first_line(error)}") from error


def _class_names(folder: Path, groups: Sequence[_Group]) -> tuple[str, ...]:
    if groups and not (folder / CLASSES_FILE).is_file():
        stored = (groups[0].metadata.metadata or {}).get(b"huggingface", b"{}")
        try:
            return tuple(map(str, json.loads(stored)["info"]["features"]["label"]["names"]))
        except (ValueError, KeyError, TypeError):
            pass  # not from there
    return read_class_names(folder)
