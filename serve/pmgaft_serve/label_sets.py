"""Label lists that an operator keeps in files, and that requests call by name: "labels": "@NAME"."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pmgaft.clip.ensembles import named_templates
from pmgaft.clip.text import DEFAULT_TEMPLATES, check_labels, fill
from pmgaft.errors import InputError, LabelsError, quote

MARK = "@"  # before a set's name, where labels are expected
MOST_LABELS = 1_000_000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSet:
    """Labels under a name, with the templates that are used where a request names none."""

    name: str
    labels: tuple[str, ...]
    templates: tuple[str, ...] = DEFAULT_TEMPLATES


def templates_from(value: str | Sequence[str]) -> tuple[str, ...]:
    """A list of templates, one template, or the name of a standard set (`imagenet`) -> templates.

    Raises: LabelsError (template_invalid) for the name of none.
    """
    if isinstance(value, str):
        return (value,) if "{" in value or "}" in value else named_templates(value)
    return tuple(value)


def read_label_set(path: Path, name: str = "", *, longest: int = 300) -> LabelSet:
    """A file with a label a line; or a JSON list; or a JSON object with `labels` and perhaps `templates`.

    Raises: InputError (label_file_invalid) naming the file; LabelsError for labels that cannot be answered.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror or str(error)
        raise _file_error(path, f"cannot be read: {reason}") from None
    content = _content(path, text)
    labels, templates = content["labels"], content.get("templates", list(DEFAULT_TEMPLATES))
    try:
        check_labels(labels, most=MOST_LABELS, longest=longest)
        used = templates_from(templates)
        if not used:
            raise LabelsError("there is no template", field="templates", code="template_invalid")
        for template in used:
            fill(template, "")
    except LabelsError as error:
        raise LabelsError(f"{path}: {error.message}", field=error.field, code=error.code) from None
    return LabelSet(name=name, labels=tuple(labels), templates=used)


def named_label_set(text: str, *, longest: int = 300) -> LabelSet:
    """What `NAME=FILE` on the command line stands for. Raises: InputError (label_set_invalid, label_file_invalid)."""
    name, _, path = text.partition("=")
    if not _NAME.fullmatch(name) or not path:
        message = f"{quote(text)} is no label set; write NAME=FILE, the name in letters, digits, '.', '_' and '-'"
        raise InputError(message, field="label_set", code="label_set_invalid")
    return read_label_set(Path(path), name, longest=longest)


def write_label_sets(path: Path, sets: Sequence[LabelSet]) -> None:
    """For `load_label_sets`, in a worker: files may change while a server runs, what it serves may not."""
    path.write_text(json.dumps([asdict(one) for one in sets]), encoding="utf-8")


def load_label_sets(path: Path) -> list[LabelSet]:
    """What `write_label_sets` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return [
        LabelSet(name=one["name"], labels=tuple(one["labels"]), templates=tuple(one["templates"])) for one in content
    ]


def _content(path: Path, text: str) -> dict[str, Any]:
    if text.lstrip()[:1] not in ("[", "{"):
        return {"labels": [line.strip() for line in text.splitlines() if line.strip()]}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise _file_error(path, "begins like JSON and is none") from None
    if isinstance(content, list):
        return {"labels": content}
    if not isinstance(content, dict) or "labels" not in content or set(content) - {"labels", "templates"}:
        raise _file_error(path, 'must be a JSON list, or an object with "labels" and perhaps "templates"')
    templates = content.get("templates", "")
    if not isinstance(templates, str) and not (
        isinstance(templates, list) and all(isinstance(template, str) for template in templates)
    ):
        raise _file_error(path, 'has "templates" that are neither a list of strings nor the name of a standard set')
    return content


def _file_error(path: Path, problem: str) -> InputError:
    return InputError(f"label file {path} {problem}", field="labels", code="label_file_invalid")
