"""torchvision's data sets by name: "torchvision:CIFAR10?root=/data&download=1"."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from PIL import Image

from pmgaft.data.image_set import Split, StoredImages, templates_for
from pmgaft.errors import DataError, first_line

PREFIX = "torchvision:"


def open_torchvision(where: str, split: Split, default_root: Path) -> StoredImages:
    """A set of torchvision's, with PNG-encoded images.

    where: "torchvision:NAME", with "?root=DIRECTORY" (else `default_root`) and "&download=1" if it may be fetched.
    Raises: DataError for an unknown name, or where the files are not there.
    """
    name, _, query = where.removeprefix(PREFIX).partition("?")
    options = dict(parse_qsl(query))
    unknown = options.keys() - {"root", "download"}
    if unknown:
        raise DataError(f"{where}: unknown option {sorted(unknown)[0]}; there are root and download")
    root = Path(options.get("root", default_root)).expanduser()
    dataset = _construct(_class(name), name, split, root, download=options.get("download", "0") not in ("0", "false"))
    labels = _labels(dataset)

    def encoded(index: int) -> bytes:
        picture, _ = dataset[index]
        return _png(picture)

    return StoredImages(
        name=name.lower(),
        class_names=_class_names(dataset, name),
        templates=templates_for(name),
        labels=labels,
        encoded=encoded,
        fingerprint=lambda: hashlib.sha256(f"{name} {split} {len(labels)}".encode()).hexdigest(),
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
    if "train" in known:
        choices: list[dict[str, Any]] = [{"train": split == "train"}]
    elif "split" in known:
        choices = (
            [{"split": "train"}, {"split": "trainval"}] if split == "train" else [{"split": "test"}, {"split": "val"}]
        )
    else:
        choices = [{}]
    hint = f"add ?root={root}&download=1 to fetch it" if "download" in known else "torchvision cannot fetch it"
    for choice in choices:
        try:
            return kind(**options, **choice)
        except ValueError:  # no split of that name
            continue
        except (RuntimeError, OSError) as error:
            message = f"torchvision's {name} is not ready in {root} ({first_line(error)}); {hint}"
            raise DataError(message) from error
    raise DataError(f"torchvision's {name} has no {split} split")


def _labels(dataset: Any) -> list[int]:
    for attribute in ("targets", "labels", "_labels"):
        if hasattr(dataset, attribute):
            return [int(label) for label in getattr(dataset, attribute)]
    if hasattr(dataset, "_samples"):
        return [int(label) for _, label in dataset._samples]
    return [int(dataset[index][1]) for index in range(len(dataset))]


def _class_names(dataset: Any, name: str) -> tuple[str, ...]:
    classes = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    if not classes:
        raise DataError(
            f"torchvision does not name the classes of {name}; save it as an image folder with classes.json"
        )
    # ImageNet's classes are tuples of synonyms
    return tuple((entry if isinstance(entry, str) else entry[0]).replace("_", " ") for entry in classes)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
