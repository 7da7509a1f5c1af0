"""Attacks on the words instead of the pixels: another template, or another name for the same thing.

Zero-shot's own weak side, and another threat than noise on pixels: the two are never one number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pmgaft.clip.text import label_features, mean_over_templates, prompts
from pmgaft.probe.surface import Groups, leads_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """One other wording, and the label that the model answers then, by position."""

    text: str
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Wordings:
    """templates: how many were tried, one at a time for all labels; synonyms: for the clean answer's label alone.
    flipped_by_template, flipped_by_synonym: those that change the answer.
    """

    templates: int
    flipped_by_template: tuple[Wording, ...]
    synonyms: int
    flipped_by_synonym: tuple[Wording, ...]


def wordings(
    encode_text: Callable[[Sequence[str]], Tensor],
    features: Tensor,
    labels: Sequence[str],
    templates: Sequence[str],
    *,
    others: Sequence[str],
    synonyms: Sequence[str] = (),
    groups: Groups = (),
) -> Wordings:
    """features: unit, of the image, [D]. templates: those of the question; others: to be tried instead, each alone.
    synonyms: other names of the clean answer's label, each tried in its place. groups: labels that count as one answer.
    Raises: LabelsError (template_invalid, label_too_long).
    """
    leads = leads_of(groups, len(labels))
    device = features.device
    own = label_features(encode_text, labels, templates).to(device)
    clean = int((own @ features).argmax())
    encoded = encode_text(prompts(labels, others)).to(device).view(len(labels), len(others), -1) if others else None
    by_template, by_synonym = [], []
    for turn, template in enumerate(others):
        assert encoded is not None
        index = int((encoded[:, turn] @ features).argmax())
        if leads[index] != leads[clean]:
            by_template.append(Wording(text=template, index=index))
    if synonyms:
        named = mean_over_templates(encode_text(prompts(synonyms, templates)).to(device), len(templates))
        for text, feature in zip(synonyms, named, strict=True):
            index = int(torch.cat([own[:clean], feature[None], own[clean + 1 :]]).mv(features).argmax())
            if leads[index] != leads[clean]:
                by_synonym.append(Wording(text=text, index=index))
    return Wordings(
        templates=len(others),
        flipped_by_template=tuple(by_template),
        synonyms=len(synonyms),
        flipped_by_synonym=tuple(by_synonym),
    )
