"""Prompt ensembles by name, from a data file of our own: a serving worker must not import open_clip."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

from pmgaft.errors import LabelsError, quote


def named_templates(name: str) -> tuple[str, ...]:
    """The templates, each with one "{}", of the ensemble called `name`.

    "imagenet" is the 80 that OpenAI published for ImageNet (Radford et al. 2021, section 3.1.4), "simple" the 7 of them
    that do nearly as well: open_clip's OPENAI_IMAGENET_TEMPLATES and SIMPLE_IMAGENET_TEMPLATES, in their order.
    Raises: LabelsError (template_invalid) for another name.
    """
    known = ensembles()
    if name not in known:
        message = f"there is no template ensemble {quote(name)}; there are {', '.join(known)}"
        raise LabelsError(message, field="templates", code="template_invalid")
    return known[name]


@cache
def ensembles() -> dict[str, tuple[str, ...]]:
    """All ensembles by name."""
    content = resources.files("pmgaft.clip").joinpath("ensembles.json").read_text(encoding="utf-8")
    return {name: tuple(templates) for name, templates in json.loads(content).items()}
