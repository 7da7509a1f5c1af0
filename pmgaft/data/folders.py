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
    class_names, label_of = _classes(directories, classes_folder)
    labels: list[int] = []
    files: list[Path] = []
    for directory in directories:
        found = sorted(path for path in directory.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise DataError(f"the class directory {directory} holds no images")
        files += found
        labels += [label_of[directory]] * len(found)

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


def _classes(directories: list[Path], classes_folder: Path) -> tuple[tuple[str, ...], dict[Path, int]]:
    """The class names, and each directory's label."""
    if not (classes_folder / CLASSES_FILE).is_file():
        names = tuple(path.name.replace("_", " ") for path in directories)
        return names, {path: label for label, path in enumerate(directories)}
    entries = read_classes(classes_folder)
    known = {
        entry[key]: label for key in ("name", "wnid", "source") for label, entry in enumerate(entries) if key in entry
    }
    unknown = [path.name for path in directories if path.name not in known]
    if unknown:
        raise DataError(f"{classes_folder / CLASSES_FILE} does not know the class directory {unknown[0]}")
    return tuple(entry["name"] for entry in entries), {path: known[path.name] for path in directories}
