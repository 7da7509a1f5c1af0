"""Image folders: one directory per class."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pmgaft.data.image_set import (
    CLASSES_FILE,
    IMAGE_SUFFIXES,
    StoredImages,
    read_classes,
    templates_for,
)
from pmgaft.errors import DataError


def open_folder(folder: Path, name: str, classes_folder: Path) -> StoredImages:
    """The images below `folder`, one directory per class, in the order of their names.

    A class is called as its directory, "_" read as space; or as an entry of classes.json in `classes_folder` says whose
    `source`, `wnid` or `name` is the directory's name.
    Raises: DataError for a directory that classes.json does not know, or without images.
    """
    directories = class_directories(folder)
    names = _names(directories, classes_folder)
    order = sorted(set(names.values()))
    class_names = tuple(name for _, name in order)
    labels: list[int] = []
    files: list[Path] = []
    for directory in directories:
        found = sorted(path for path in directory.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise DataError(f"the class directory {directory} holds no images")
        files += found
        labels += [order.index(names[directory])] * len(found)

    def encoded(index: int) -> bytes:
        try:
            return files[index].read_bytes()
        except OSError as error:
            raise DataError(f"{files[index]} cannot be read: {error.strerror}") from error

    def fingerprint() -> str:
        # Names and sizes: an image folder may be a whole ImageNet.
        facts = "\n".join(f"{file.relative_to(folder)} {file.stat().st_size}" for file in files)
        return hashlib.sha256(facts.encode()).hexdigest()

    return StoredImages(
        name=name,
        class_names=class_names,
        templates=templates_for(name, classes_folder),
        labels=labels,
        encoded=encoded,
        fingerprint=fingerprint,
    )


def class_directories(folder: Path) -> list[Path]:
    """Its sub-directories, sorted, hidden ones left out."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _names(directories: list[Path], classes_folder: Path) -> dict[Path, tuple[int, str]]:
    """Each directory's (rank, class name)."""
    if not (classes_folder / CLASSES_FILE).is_file():
        return {path: (rank, path.name.replace("_", " ")) for rank, path in enumerate(directories)}
    known = {
        entry[key]: (rank, entry["name"])
        for key in ("name", "wnid", "source")
        for rank, entry in enumerate(read_classes(classes_folder))
        if key in entry
    }
    unknown = [path.name for path in directories if path.name not in known]
    if unknown:
        raise DataError(f"{classes_folder / CLASSES_FILE} does not know the class directory {unknown[0]}")
    return {path: known[path.name] for path in directories}
