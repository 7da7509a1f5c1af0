"""Image folders: one directory per class; and Tiny ImageNet, whose val part as distributed is not one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from pmgaft.data.image_set import CLASSES_FILE, IMAGE_SUFFIXES, StoredImages, read_classes
from pmgaft.data.prompts import Prompts, readable_names, templates_for
from pmgaft.errors import DataError

ANNOTATIONS_FILE = "val_annotations.txt"  # of Tiny ImageNet: file name, WordNet id, and a box, separated by tabs


def open_folder(folder: Path, name: str, classes_folder: Path, prompts: Prompts) -> StoredImages:
    """The images below `folder`, one directory per class, in the order of their names.

    A class is called as its directory, "_" read as space; ImageNet's classes, where all directories are WordNet ids; or
    as an entry of classes.json in `classes_folder` says whose `source`, `wnid` or `name` is the directory's name.
    Raises: DataError for a directory that classes.json does not know, or without images.
    """
    directories = class_directories(folder)
    class_names, label_of = _classes(directories, classes_folder, name, prompts)
    labels: list[int] = []
    files: list[Path] = []
    for directory in directories:
        found = sorted(path for path in directory.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise DataError(f"the class directory {directory} holds no images")
        files += found
        labels += [label_of[directory]] * len(found)
    return stored_files(name, files, labels, class_names, templates_for(name, classes_folder, prompts), folder)


def open_annotated(folder: Path, name: str, prompts: Prompts) -> StoredImages:
    """The val part of Tiny ImageNet as distributed: `folder`/images and `folder`/val_annotations.txt.

    Labels are places among the WordNet ids in order, as in the training part read as an image folder.
    Raises: DataError for a line that cannot be read, or an image that is not there.
    """
    annotations = folder / ANNOTATIONS_FILE
    rows = [line.split("\t") for line in annotations.read_text(encoding="utf-8").splitlines() if line.strip()]
    listed = folder.parent / "wnids.txt"
    wnids = sorted(listed.read_text().split() if listed.is_file() else {row[1] for row in rows if len(row) > 1})
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    for number, row in enumerate(rows, start=1):
        if len(row) < 2 or row[1] not in label_of or not (folder / "images" / row[0]).is_file():
            raise DataError(f"{annotations}, line {number}, does not name an image and a class that are there")
    return stored_files(
        name,
        [folder / "images" / row[0] for row in rows],
        [label_of[row[1]] for row in rows],
        readable_names(name, wnids, prompts),
        templates_for(name, None, prompts),
        folder,
    )


def stored_files(
    name: str,
    files: Sequence[Path],
    labels: Sequence[int],
    class_names: tuple[str, ...],
    templates: tuple[str, ...],
    folder: Path,
) -> StoredImages:
    """An image set whose images are files below `folder`."""

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
        templates=templates,
        labels=labels,
        encoded=encoded,
        fingerprint=fingerprint,
    )


def class_directories(folder: Path) -> list[Path]:
    """Its sub-directories, sorted, hidden ones left out."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _classes(
    directories: list[Path], classes_folder: Path, name: str, prompts: Prompts
) -> tuple[tuple[str, ...], dict[Path, int]]:
    """The class names, and each directory's label."""
    if not (classes_folder / CLASSES_FILE).is_file():
        names = readable_names(name, [path.name for path in directories], prompts)
        return names, {path: label for label, path in enumerate(directories)}
    entries = read_classes(classes_folder)
    known = {
        entry[key]: label for key in ("name", "wnid", "source") for label, entry in enumerate(entries) if key in entry
    }
    unknown = [path.name for path in directories if path.name not in known]
    if unknown:
        raise DataError(f"{classes_folder / CLASSES_FILE} does not know the class directory {unknown[0]}")
    return tuple(entry["name"] for entry in entries), {path: known[path.name] for path in directories}
