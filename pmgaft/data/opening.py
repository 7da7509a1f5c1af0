"""From what a recipe or a command line says to an ImageSet."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from pmgaft.data import skimage_crops, torchvision_sets
from pmgaft.data.folders import class_directories, open_folder
from pmgaft.data.image_set import ImageSet, Split
from pmgaft.errors import DataError

DATA_VARIABLE = "PMGAFT_DATA"

_SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "test": ("test", "val", "valid", "validation"),
}
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def open_dataset(where: str, split: Split = "test", data_root: Path | None = None) -> ImageSet:
    """The data set that `where` names.

    where: a parquet file, or a folder of them with classes.json; an image folder, one directory per class; webdataset
    shards ("shards-{000..003}.tar", one tar file, or a folder of them) with classes.json beside them;
    "torchvision:NAME", see torchvision_sets; "skimage", a demonstration set; or the name of a folder below `data_root`.
    split: which files of a folder are taken (names that start with train; with test or val). A folder without such
    names, and a file, is taken whole.
    data_root: else the environment's PMGAFT_DATA, which may list several, separated as in PATH.
    Raises: DataError if there is no such set, or it is damaged.
    """
    roots = [data_root] if data_root else [Path(r) for r in os.environ.get(DATA_VARIABLE, "").split(os.pathsep) if r]
    if where == skimage_crops.NAME:
        return skimage_crops.open_skimage(split)
    if where.startswith(torchvision_sets.PREFIX):
        return torchvision_sets.open_torchvision(where, split, roots[0] if roots else Path("data"))
    path = Path(where).expanduser()
    if _RANGE.search(where) or path.is_file():
        return _open_files(list(_expanded(path)), path.parent)
    if path.is_dir():
        return _open_folder(path, split)
    return _open_folder(_below(roots, where), split)


def _open_files(files: list[Path], folder: Path) -> ImageSet:
    for file in files:
        if not file.is_file():
            raise DataError(f"there is no file {file}")
    if files[0].suffix == ".parquet":
        from pmgaft.data.parquet import open_parquet

        return open_parquet(files, folder)
    if files[0].suffix == ".tar":
        from pmgaft.data.shards import open_shards

        return open_shards(files, folder)
    raise DataError(f"{files[0]} is neither a .parquet file nor an uncompressed .tar file")


def _open_folder(folder: Path, split: Split) -> ImageSet:
    for pattern in ("*.parquet", "*.tar"):
        files = sorted(folder.glob(pattern))
        if files:
            return _open_files(_of_split(files, split, folder), folder)
    for part in class_directories(folder):
        if part.name.lower() in _SPLIT_NAMES[split] and class_directories(part):
            return open_folder(part, folder.resolve().name, folder)
    if not class_directories(folder):
        raise DataError(f"{folder} holds no data set: no .parquet or .tar files and no class directories")
    return open_folder(folder, folder.resolve().name, folder)


def _of_split(files: list[Path], split: Split, folder: Path) -> list[Path]:
    """The files of this split. Where no file's name says to which split it belongs, all of them."""
    named = {
        name: [file for file in files if file.name.lower().startswith(starts)] for name, starts in _SPLIT_NAMES.items()
    }
    if not any(named.values()):
        return files
    if not named[split]:
        raise DataError(f"{folder} has no {split} split; it has {', '.join(file.name for file in files[:3])}")
    return named[split]


def _expanded(path: Path) -> Iterator[Path]:
    """ "a-{000..002}.tar" -> three paths."""
    match = _RANGE.search(str(path))
    if match is None:
        yield path
        return
    first, last = match[1], match[2]
    for number in range(int(first), int(last) + 1):
        yield from _expanded(Path(str(path).replace(match[0], str(number).zfill(len(first)), 1)))


def _below(roots: list[Path], name: str) -> Path:
    """The folder called `name` in one of the roots, or one level below."""
    found: dict[str, Path] = {}
    for root in roots:
        if root.is_dir():
            direct = class_directories(root)
            for folder in [*direct, *(inner for outer in direct for inner in class_directories(outer))]:
                found.setdefault(folder.name, folder)
    if name in found:
        return found[name]
    if not roots:
        raise DataError(f"there is no data set {name!r}: no such file or folder, and {DATA_VARIABLE} is not set")
    near = difflib.get_close_matches(name, found, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise DataError(f"there is no data set {name!r} in {', '.join(map(str, roots))}{hint}")
