"""What the classes of known sets are called, and in which sentences: the conventions of the field, from data files.

The same picture set is reported with different words for its classes, which moves zero-shot accuracy by points:

plain   readable names in one sentence, such as "a photo of a {}, a type of pet."
paper   the names and the one sentence of PMG-AFT's and TeCoA's loaders (Wang et al. 2024, Mao et al. 2023), without
        their misspelling of PCAM's and their cut of Caltech101's names: "A photo of a {}, a type of pet."
clip    the names and ensembles that CLIP's authors chose per set (Radford et al. 2021) and CLIP-benchmark uses
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

from pmgaft.clip.ensembles import named_templates
from pmgaft.clip.text import DEFAULT_TEMPLATES, clean_text
from pmgaft.errors import DataError, first_line

Prompts = Literal["plain", "paper", "clip"]

TEMPLATES_FILE = "templates.json"
BENCHMARK_TEMPLATES_FILE = "zeroshot_classification_templates.txt"

_DEFAULTS: Mapping[Prompts, tuple[str, ...]] = {"paper": ("This is a photo of a {}",)}
_WNID = re.compile(r"n\d{8}")


def set_key(name: str) -> str:
    """How a set is looked up: by its name in lower case, without "-", "_" and blanks, as torchvision spells it."""
    key = re.sub(r"[-_ ]", "", name.lower())
    return {
        "cars": "stanfordcars",
        "fgvc": "fgvcaircraft",
        "flowers": "flowers102",
        "imagenet1k": "imagenet",
        "oxfordpet": "oxfordiiitpet",
        "oxfordpets": "oxfordiiitpet",
        "pets": "oxfordiiitpet",
        "tinyimagenet200": "tinyimagenet",
    }.get(key, key)


def templates_for(name: str, folder: Path | None = None, prompts: Prompts = "plain") -> tuple[str, ...]:
    """The prompts for the set `name`, each with one "{}".

    "plain": from templates.json in its folder, else those known here, else the default. "paper": those known here, else
    the paper's default. "clip": from CLIP-benchmark's file in its folder, else those known here, else as "plain".
    Raises: DataError if the folder's file is damaged.
    """
    if prompts == "clip" and folder is not None and (folder / BENCHMARK_TEMPLATES_FILE).is_file():
        lines = _read(folder / BENCHMARK_TEMPLATES_FILE).splitlines()
        return tuple(line.strip().replace("{c}", "{}") for line in lines if line.strip())
    if prompts == "plain" and folder is not None and (folder / TEMPLATES_FILE).is_file():
        return _own_templates(folder / TEMPLATES_FILE)
    known = _known_templates()[prompts].get(set_key(name), _DEFAULTS.get(prompts))
    if known is None:
        return templates_for(name, folder) if prompts == "clip" else DEFAULT_TEMPLATES
    return known


def readable_names(name: str, sources: Sequence[str], prompts: Prompts = "plain") -> tuple[str, ...]:
    """What the classes of the set `name` are called, in the order given.

    sources: their names as distributed (directories, WordNet ids, lines of an annotation file).
    Raises: DataError for a WordNet id that is none of ImageNet's 1,000 classes.
    """
    if sources and all(_WNID.fullmatch(source) for source in sources):
        return _wordnet_names(sources, prompts)
    key, known = set_key(name), _known_names()
    table = known["any"].get(key, {}) | known["paper" if prompts == "paper" else "clip"].get(key, {})
    return tuple(table.get(source) or _spelled_out(key, source, prompts) for source in sources)


def duplicate_names(class_names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Groups of labels, two or more each, whose names are equal but for case and white space.

    A model cannot tell them apart: the first of a group wins every tie, and the others' images count as wrong.
    """
    labels: dict[str, list[int]] = {}
    for label, name in enumerate(class_names):
        labels.setdefault(clean_text(name), []).append(label)
    return tuple(tuple(group) for group in labels.values() if len(group) > 1)


def _spelled_out(key: str, source: str, prompts: Prompts) -> str:
    """A name for which no table has another: separators become blanks, and what is no part of a name goes."""
    if key == "caltech256":  # "251.airplanes-101": a number, and whether Caltech101 has the class, too
        source = re.sub(r"^\d{3}\.", "", source).removesuffix("-101").replace("-", " ")
    if key == "fgvcaircraft" and prompts == "paper":
        return f"boeing {source}" if source.startswith("7") else source.lower()
    name = re.sub(r"[_/]", " ", source)
    if prompts != "paper":
        return name
    if key == "stanfordcars":
        name = re.sub(r" \d{4}$", "", name)  # the year, so that some classes are called alike
    return name.lower().replace("-", " ").strip()


def _wordnet_names(wnids: Sequence[str], prompts: Prompts) -> tuple[str, ...]:
    known = _imagenet_names(prompts)
    for wnid in wnids:
        if wnid not in known:
            raise DataError(f"{wnid} is none of ImageNet's 1,000 classes; name the classes in a classes.json")
    return tuple(known[wnid] for wnid in wnids)


@cache
def _imagenet_names(prompts: Prompts) -> dict[str, str]:
    """wnid -> name: WordNet's first word for the paper, which has 997 different ones, else open_clip's, 998."""
    rows = [line.split("\t") for line in _shipped("imagenet-wnids.tsv").splitlines()]
    if prompts == "paper":
        return {wnid: _spelled_out("imagenet", word, prompts) for wnid, word in rows}
    names = _shipped("imagenet-names.txt").splitlines()
    return {wnid: name for (wnid, _), name in zip(rows, names, strict=True)}


def _own_templates(file: Path) -> tuple[str, ...]:
    try:
        own = json.loads(_read(file))
    except ValueError as error:
        raise DataError(f"{file} cannot be read: {first_line(error)}") from error
    if not isinstance(own, list) or not own or not all(isinstance(template, str) for template in own):
        raise DataError(f'{file} must be a list of templates such as "a photo of a {{}}."')
    return tuple(own)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {first_line(error)}") from error


@cache
def _known_templates() -> dict[Prompts, dict[str, tuple[str, ...]]]:
    """A set's entry is a list of templates, or the name of an ensemble."""
    return {
        prompts: {
            name: named_templates(entry) if isinstance(entry, str) else tuple(entry) for name, entry in sets.items()
        }
        for prompts, sets in json.loads(_shipped(TEMPLATES_FILE)).items()
    }


@cache
def _known_names() -> dict[str, dict[str, dict[str, str]]]:
    content: dict[str, dict[str, dict[str, str]]] = json.loads(_shipped("class_names.json"))
    return content


def _shipped(file: str) -> str:
    return resources.files("pmgaft.data").joinpath(file).read_text(encoding="utf-8")
