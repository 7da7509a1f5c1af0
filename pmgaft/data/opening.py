"""From what a recipe or a command line says to an ImageSet."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from pmgaft.data import skimage_crops, torchvision_sets
from pmgaft.data.folders import ANNOTATIONS_FILE, class_directories, open_annotated, open_folder
from pmgaft.data.image_set import ImageSet, Split
from pmgaft.data.prompts import Prompts, set_key
from pmgaft.errors import DataError

DATA_VARIABLE = "PMGAFT_DATA"

_SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "test": ("test", "val", "valid", "validation"),
}
_PACKED = ("*.parquet", "*.tar")
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


def open_dataset(
    where: str, split: Split = "test", data_root: Path | None = None, prompts: Prompts = "plain"
) -> ImageSet:
    """The data set that `where` names.

    where: a parquet file, or a folder of them with classes.json; an image folder, one directory per class; webdataset
    shards ("shards-{000..003}.tar", one tar file, or a folder of them) with classes.json or classnames.txt beside them;
    Tiny ImageNet's folder as distributed; "torchvision:NAME", see torchvision_sets; "skimage", a demonstration set; or
    the name of a folder below `data_root`, or of one of torchvision's sets that lie there.
    split: which files of a folder are taken (names, or folders, that start with train; with test or val). A folder
    without such names, and a file, is taken whole.
    data_root: else the environment's PMGAFT_DATA, which may list several, separated as in PATH.
    prompts: whose class names and templates are used for sets known here; see pmgaft.data.prompts.
    Raises: DataError if there is no such set, or it is damaged.
    """
    roots = [data_root] if data_root else [Path(r) for r in os.environ.get(DATA_VARIABLE, "").split(os.pathsep) if r]
    if where == skimage_crops.NAME:
        return skimage_crops.open_skimage(split)
    if where.startswith(torchvision_sets.PREFIX):
        return torchvision_sets.open_torchvision(where, split, roots or [Path("data")], prompts)
    path = Path(where).expanduser()
    if _BRACES.search(where) or path.is_file():
        return _open_files(list(_expanded(str(path))), path.parent, prompts)
    if path.is_dir():
        return _open_folder(path, split, prompts)
    known = torchvision_sets.known_as(where)
    if known and torchvision_sets.root_of(known, roots):  # before folders: one of its own may have the set's name
        return torchvision_sets.open_torchvision(torchvision_sets.PREFIX + known, split, roots, prompts)
    return _open_folder(_below(roots, where), split, prompts)


def _open_files(files: list[Path], folder: Path, prompts: Prompts) -> ImageSet:
    """folder: has the class names, and its name is the set's."""
    for file in files:
        if not file.is_file():
            raise DataError(f"there is no file {file}")
    if files[0].suffix == ".parquet":
        from pmgaft.data.parquet import open_parquet

        return open_parquet(files, folder, prompts)
    if files[0].suffix == ".tar":
        from pmgaft.data.shards import open_shards

        return open_shards(files, folder, prompts)
    raise DataError(f"{files[0]} is neither a .parquet file nor an uncompressed .tar file")


def _open_folder(folder: Path, split: Split, prompts: Prompts) -> ImageSet:
    name = folder.resolve().name
    for pattern in _PACKED:
        files = sorted(folder.glob(pattern), key=_as_counted)
        if files:
            return _open_files(_of_split(files, split, folder), folder, prompts)
    for part in class_directories(folder):
        if part.name.lower() not in _SPLIT_NAMES[split]:
            continue
        for pattern in _PACKED:
            files = sorted(part.glob(pattern), key=_as_counted)
            if files:
                return _open_files(files, folder, prompts)
        if (part / ANNOTATIONS_FILE).is_file() and (part / "images").is_dir():
            return open_annotated(part, name, prompts)
        if class_directories(part):
            return open_folder(part, name, folder, prompts)
    if not class_directories(folder):
        raise DataError(f"{folder} holds no data set: no .parquet or .tar files and no class directories")
    return open_folder(folder, name, folder, prompts)


def _as_counted(path: Path) -> list[str | int]:
    """So that 10.tar comes after 9.tar."""
    return [int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", path.name)]


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


def _expanded(where: str) -> Iterator[Path]:
    """ "a-{000..002}.tar" -> three paths; "{a,b}.tar" -> two."""
    match = _BRACES.search(where)
    if match is None:
        yield Path(where)
        return
    first, last, listed = match.groups()
    width = len(first or "")
    pieces = listed.split(",") if listed else [str(n).zfill(width) for n in range(int(first), int(last) + 1)]
    for piece in pieces:
        yield from _expanded(where[: match.start()] + piece + where[match.end() :])


def _below(roots: list[Path], name: str) -> Path:
    """The folder called `name` in one of the roots or one level below, else one of the same set in another spelling."""
    found: dict[str, Path] = {}
    for root in roots:
        if root.is_dir():
            direct = class_directories(root)
            for folder in [*direct, *(inner for outer in direct for inner in class_directories(outer))]:
                found.setdefault(folder.name, folder)
    spellings = {set_key(known): folder for known, folder in reversed(found.items())}
    folder_found = found.get(name) or spellings.get(set_key(name))
    if folder_found:
        return folder_found
    if not roots:
        raise DataError(f"there is no data set {name!r}: no such file or folder, and {DATA_VARIABLE} is not set")
    known = torchvision_sets.known_as(name)
    near = difflib.get_close_matches(name, [*found, *torchvision_sets.KNOWN], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    if known:
        fetch = f"torchvision:{known}?root=DIRECTORY&download=1"
        hint = f", and no {torchvision_sets.KNOWN[known]}; where torchvision can fetch it, name it once as {fetch}"
    raise DataError(f"there is no data set {name!r} in {', '.join(map(str, roots))}{hint}")
