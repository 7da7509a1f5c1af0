"""torchvision's data sets by name, in torchvision's own layouts: "torchvision:CIFAR10?root=/data&download=1"."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from PIL import Image

from pmgaft.data.folders import stored_files
from pmgaft.data.image_set import Split, StoredImages
from pmgaft.data.prompts import Prompts, readable_names, set_key, templates_for
from pmgaft.errors import DataError, first_line

PREFIX = "torchvision:"

KNOWN: Mapping[str, str] = {
    "CIFAR10": "cifar-10-batches-py",
    "CIFAR100": "cifar-100-python",
    "Caltech101": "caltech101/101_ObjectCategories",
    "Caltech256": "caltech256/256_ObjectCategories",
    "Country211": "country211/test",
    "DTD": "dtd/dtd",
    "EuroSAT": "eurosat/2750",
    "FGVCAircraft": "fgvc-aircraft-2013b",
    "Flowers102": "flowers-102",
    "Food101": "food-101",
    "ImageNet": "ILSVRC2012_devkit_t12.tar.gz",
    "OxfordIIITPet": "oxford-iiit-pet",
    "PCAM": "pcam",
    "STL10": "stl10_binary",
    "SUN397": "SUN397",
    "StanfordCars": "stanford_cars",
}
"""Sets that may be named without "torchvision:", each with what a root that holds it has. With Tiny ImageNet, which is
a folder, these are what PMG-AFT and TeCoA evaluate on. EuroSAT, SUN397 and the Caltechs have no splits: they are taken
whole, as there."""

_SPLITS: Mapping[Split, tuple[str, ...]] = {"train": ("train", "trainval"), "test": ("test", "val")}
_SAMPLED = 200
"""So many images, evenly spread, make the hash of a set that is not made of files."""


def known_as(name: str) -> str | None:
    """torchvision's spelling of a set's name; None for one that must be asked for with "torchvision:"."""
    return {set_key(known): known for known in KNOWN}.get(set_key(name))


def root_of(name: str, roots: Sequence[Path]) -> Path | None:
    """The first of `roots` that holds the set."""
    return next((root for root in roots if name in KNOWN and (root / KNOWN[name]).exists()), None)


def open_torchvision(where: str, split: Split, roots: Sequence[Path], prompts: Prompts) -> StoredImages:
    """A set of torchvision's; its own files where it is made of files, else PNG-encoded images.

    where: "torchvision:NAME", with "?root=DIRECTORY" (else the first of `roots` that has the set, else the first) and
    "&download=1" if it may be fetched.
    Raises: DataError for an unknown name, or where the files are not there.
    """
    name, _, query = where.removeprefix(PREFIX).partition("?")
    options = dict(parse_qsl(query))
    unknown = options.keys() - {"root", "download"}
    if unknown:
        raise DataError(f"{where}: unknown option {sorted(unknown)[0]}; there are root and download")
    kind = _class(name)
    root = Path(options["root"]).expanduser() if "root" in options else root_of(name, roots) or roots[0]
    dataset = _construct(kind, name, split, root, download=options.get("download", "0") not in ("0", "false"))
    class_names = readable_names(name, _sources(dataset, name), prompts)
    templates = templates_for(name, None, prompts)
    samples = _samples(dataset)
    if samples:
        if name == "SUN397":  # torchvision's order is the file system's
            samples.sort()
        files, labels = [file for file, _ in samples], [label for _, label in samples]
        return stored_files(name.lower(), files, labels, class_names, templates, root)
    return _drawn(dataset, name, class_names, templates)


def _drawn(dataset: Any, name: str, class_names: tuple[str, ...], templates: tuple[str, ...]) -> StoredImages:
    """A set whose images are not files: torchvision draws them."""
    labels = _labels(dataset)

    def encoded(index: int) -> bytes:
        buffer = io.BytesIO()
        picture: Image.Image = dataset[index][0]
        picture.convert("RGB").save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def fingerprint() -> str:
        digest = hashlib.sha256()
        for index in range(0, len(labels), max(1, len(labels) // _SAMPLED)):
            digest.update(dataset[index][0].tobytes())
        return digest.hexdigest()

    return StoredImages(
        name=name.lower(),
        class_names=class_names,
        templates=templates,
        labels=labels,
        encoded=encoded,
        fingerprint=fingerprint,
    )


def _class(name: str) -> Callable[..., Any]:
    from torchvision import datasets

    if name not in datasets.__all__:
        near = difflib.get_close_matches(name, datasets.__all__, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise DataError(f"torchvision has no data set {name!r}{hint}")
    found: Callable[..., Any] = getattr(datasets, name)
    return found


def _construct(kind: Callable[..., Any], name: str, split: Split, root: Path, *, download: bool) -> Any:
    known = inspect.signature(kind).parameters
    options: dict[str, Any] = {"root": root}
    if "download" in known:
        options["download"] = download
    choices: list[dict[str, Any]] = [{}]
    if "train" in known:
        choices = [{"train": split == "train"}]
    elif "split" in known:
        choices = [{"split": choice} for choice in _SPLITS[split]]
    fetch = f"add ?root={root}&download=1 to fetch it" if "download" in known else "torchvision cannot fetch it"
    for choice in choices:
        try:
            return kind(**options, **choice)
        except (RuntimeError, OSError, ValueError, KeyError, TypeError) as error:
            problem = first_line(error)
            if "argument split" in problem:  # it has no split of that name
                continue
            hint = 'pip install "pmgaft[datasets]"' if "not found. This dataset needs" in problem else fetch
            raise DataError(f"torchvision's {name} is not ready in {root} ({problem}); {hint}") from error
    raise DataError(f"torchvision's {name} has no {split} split")


def _samples(dataset: Any) -> list[tuple[Path, int]]:
    """The files and labels of a set that is made of files; empty for others. torchvision has no public way to ask."""
    for attribute in ("_samples", "samples"):
        if hasattr(dataset, attribute):
            return [(Path(file), int(label)) for file, label in getattr(dataset, attribute)]
    for attribute in ("_image_files", "_images"):
        if hasattr(dataset, attribute):
            files = getattr(dataset, attribute)
            return [(Path(file), int(label)) for file, label in zip(files, dataset._labels, strict=True)]
    return []


def _labels(dataset: Any) -> list[int]:
    for attribute in ("targets", "labels", "_labels", "y"):
        if hasattr(dataset, attribute):
            return [int(label) for label in getattr(dataset, attribute)]
    if hasattr(dataset, "h5py"):  # PCAM, whose images need not be decoded for this
        with dataset.h5py.File(dataset._base_folder / dataset._FILES[dataset._split]["targets"][0]) as file:
            return [int(label) for label in file["y"][:].flatten()]
    return [int(dataset[index][1]) for index in range(len(dataset))]


def _sources(dataset: Any, name: str) -> list[str]:
    """What the set itself calls its classes."""
    if name == "PCAM":
        return ["0", "1"]
    found = getattr(dataset, "wnids", None) or getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    if not found:
        raise DataError(
            f"torchvision does not name the classes of {name}; save it as an image folder with classes.json"
        )
    return list(found)
