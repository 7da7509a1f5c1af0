"""The classes of a set as the model can tell them apart. Letters: K names, C distinct classes, D features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pmgaft.clip.ensembles import ensembles
from pmgaft.clip.text import label_features
from pmgaft.data import duplicate_names
from pmgaft.errors import InputError, LabelsError, quote

_SAME = 1e-5
"""Largest distance of two unit features that are equal but for float rounding."""

_AT_ONCE = 256
"""Classes whose distances to all others are held at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Classes:
    """Names that the model cannot tell apart are one class: equal names, or names with equal features. Otherwise the
    first of them would win every tie, half of their images would be wrong for no fault of the model's, and no attack
    could do anything with them.

    features: unit, float32 [C, D]. of_label: int64 [K], a label's class. first_label: int64 [C], a class's first label.
    merged: groups of (label, name), two or more each.
    """

    features: Tensor
    of_label: Tensor
    first_label: Tensor
    merged: tuple[tuple[tuple[int, str], ...], ...]

    def __len__(self) -> int:
        return len(self.features)


def chosen_templates(words: Sequence[str]) -> tuple[str, ...]:
    """Templates as they stand, and ensembles by name. Raises: LabelsError (template_invalid) for what is neither."""
    found: list[str] = []
    for word in words:
        if "{" in word or "}" in word:
            found.append(word)
        elif word in ensembles():
            found += ensembles()[word]
        else:
            known = ", ".join(ensembles())
            message = f'{quote(word)} is neither a template such as "a photo of a {{}}." nor one of the lists {known}'
            raise LabelsError(message, field="templates", code="template_invalid")
    return tuple(found)


def distinct_classes(
    encode: Callable[[Sequence[str]], Tensor], names: Sequence[str], templates: Sequence[str], where: str
) -> Classes:
    """The classes of the set called `where`.

    Raises: InputError where fewer than two can be told apart; LabelsError (template_invalid, label_too_long).
    """
    features = label_features(encode, names, templates)
    first = torch.arange(len(names))
    for group in duplicate_names(names):
        first[list(group)] = group[0]
    known = features.double().cpu()[first]
    nearest = [(torch.cdist(some, known) < _SAME).int().argmax(dim=1) for some in torch.split(known, _AT_ONCE)]
    first = first[torch.cat(nearest)]
    first_label, of_label = torch.unique(first[first], return_inverse=True)
    if len(first_label) < 2:
        raise InputError(f"{where} has fewer than two classes that the model can tell apart; nothing can be judged")
    groups = (
        tuple((label, names[label]) for label in (of_label == which).nonzero()[:, 0].tolist())
        for which in range(len(first_label))
    )
    return Classes(
        features=features[first_label.to(features.device)],
        of_label=of_label,
        first_label=first_label,
        merged=tuple(group for group in groups if len(group) > 1),
    )
