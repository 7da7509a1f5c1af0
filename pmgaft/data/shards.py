"""Webdataset shards: tar files with KEY.jpg (or png, webp) and KEY.cls beside it.

The shards are indexed once and then read at any position, so that a shuffled, resumable order needs no shuffle buffer.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pmgaft.data.image_set import StoredImages, files_hash, read_class_names, templates_for
from pmgaft.errors import DataError, first_line

_IMAGES = ("jpg", "jpeg", "png", "webp")
_LABEL = "cls"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an image's bytes lie."""

    shard: Path
    offset: int
    size: int


def open_shards(files: Sequence[Path], folder: Path) -> StoredImages:
    """The samples of uncompressed tar files. folder: has classes.json; its name is the set's.

    Raises: DataError, naming shard and sample, for a truncated shard, or an image without a label or the reverse.
    """
    places: list[_Place] = []
    labels: list[int] = []
    for shard in files:
        for place, label in _samples(shard):
            places.append(place)
            labels.append(label)

    def encoded(index: int) -> bytes:
        place = places[index]
        try:
            with place.shard.open("rb") as stream:
                stream.seek(place.offset)
                return stream.read(place.size)
        except OSError as error:
            raise DataError(f"{place.shard} cannot be read: {error.strerror}") from error

    name = folder.resolve().name
    return StoredImages(
        name=name,
        class_names=read_class_names(folder),
        templates=templates_for(name, folder),
        labels=labels,
        encoded=encoded,
        fingerprint=lambda: files_hash(files),
    )


def _samples(shard: Path) -> list[tuple[_Place, int]]:
    images: dict[str, _Place] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                key, _, kind = base.partition(".")
                if kind.lower() in _IMAGES:
                    images[f"{folder}/{key}"] = _Place(shard, member.offset_data, member.size)
                elif kind.lower() == _LABEL:
                    labels[f"{folder}/{key}"] = _label(archive, member, shard)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{shard} is not a readable tar file: {first_line(error)}") from error
    for key in images.keys() ^ labels.keys():
        missing = "label (.cls)" if key in images else "image"
        raise DataError(f"{shard}: sample {key.strip('/')} has no {missing}")
    return [(place, labels[key]) for key, place in images.items()]


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> int:
    stream = archive.extractfile(member)
    assert stream is not None
    text = stream.read(32).decode("ascii", errors="replace").strip()
    if not text.isdecimal():
        raise DataError(f"{shard}: {member.name} holds {text!r}, not a class number")
    return int(text)
