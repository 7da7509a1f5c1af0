"""Webdataset shards: tar files with KEY.jpg (or jpeg, png, webp) and KEY.cls, or KEY.json with a "label", beside it.

The shards are indexed once and then read at any position, so that a shuffled, resumable order needs no shuffle buffer.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pmgaft.data.image_set import StoredImages, files_hash, read_class_names
from pmgaft.data.prompts import Prompts, templates_for
from pmgaft.errors import DataError, first_line

_IMAGES = ("jpg", "jpeg", "png", "webp")
_LABEL = "cls"
_FACTS = "json"
_LONGEST_FACTS = 2**20  # bytes of a .json that is looked into


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an image's bytes lie."""

    shard: Path
    offset: int
    size: int


def open_shards(files: Sequence[Path], folder: Path, prompts: Prompts) -> StoredImages:
    """The samples of uncompressed tar files. folder: has classes.json or classnames.txt; its name is the set's.

    A sample's key is its name up to the first dot after the last slash, as for webdataset. Its label is what .cls says;
    "label" of .json where there is no .cls. Members of other kinds are left alone.
    Raises: DataError, naming shard and sample, for a truncated shard, an image without a label or the reverse, or a
    sample with two images.
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
        templates=templates_for(name, folder, prompts),
        labels=labels,
        encoded=encoded,
        fingerprint=lambda: files_hash(files),
    )


def _samples(shard: Path) -> list[tuple[_Place, int]]:
    images: dict[str, _Place] = {}
    labels: dict[str, int] = {}
    facts: dict[str, tarfile.TarInfo] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                key, kind = f"{folder}/{stem}".strip("/"), kind.lower()
                if kind in _IMAGES:
                    if key in images:
                        raise DataError(f"{shard}: sample {key} has two images")
                    images[key] = _Place(shard, member.offset_data, member.size)
                elif kind == _LABEL:
                    labels[key] = _label(archive, member, shard)
                elif kind == _FACTS:
                    facts[key] = member
            for key in images.keys() & facts.keys() - labels.keys():
                label = _label_in_facts(archive, facts[key])
                if label is not None:
                    labels[key] = label
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{shard} is not a readable tar file: {first_line(error)}") from error
    for key in images.keys() ^ labels.keys():
        missing = "label (.cls, or .json with a label)" if key in images else "image"
        raise DataError(f"{shard}: sample {key} has no {missing}")
    return [(place, labels[key]) for key, place in images.items()]


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> int:
    text = _read(archive, member, 32).decode("ascii", errors="replace").strip()
    if not text.isdecimal():
        raise DataError(f"{shard}: {member.name} holds {text!r}, not a class number")
    return int(text)


def _label_in_facts(archive: tarfile.TarFile, member: tarfile.TarInfo) -> int | None:
    try:
        facts = json.loads(_read(archive, member, _LONGEST_FACTS))
    except (ValueError, RecursionError):
        return None
    label = facts.get("label") if isinstance(facts, dict) else None
    return label if isinstance(label, int) and not isinstance(label, bool) else None


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo, most: int) -> bytes:
    stream = archive.extractfile(member)
    assert stream is not None
    return stream.read(most)
