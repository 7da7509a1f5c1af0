"""Parquet files with the columns `image` (an encoded file) and `label` (its position in classes.json)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pmgaft.data.image_set import StoredImages, files_hash, read_class_names, templates_for
from pmgaft.errors import DataError, first_line


def open_parquet(files: Sequence[Path], folder: Path) -> StoredImages:
    """The rows of `files`, one after the other, held in memory. folder: has classes.json; its name is the set's.

    Raises: DataError, naming the file, for a damaged one.
    """
    table = pa.concat_tables([_read(file) for file in files])
    images: pa.ChunkedArray = table["image"]

    def encoded(index: int) -> bytes:
        content: bytes = images[index].as_py()
        return content

    name = folder.resolve().name
    return StoredImages(
        name=name,
        class_names=read_class_names(folder),
        templates=templates_for(name, folder),
        labels=[int(label) for label in table["label"].to_pylist()],
        encoded=encoded,
        fingerprint=lambda: files_hash(files),
    )


def _read(file: Path) -> pa.Table:
    try:
        table = pq.read_table(file, columns=["image", "label"], partitioning=None)
        table = table.cast(pa.schema([("image", pa.large_binary()), ("label", pa.int64())]))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{file} is damaged or not of the form image, label: {first_line(error)}") from error
    if table["image"].null_count or table["label"].null_count:
        raise DataError(f"{file} has rows without image or label")
    return table
