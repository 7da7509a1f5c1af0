"""Labels that are hard to tell apart, whatever the picture: found on the text side, before any picture is seen.

Between two labels that the model hardly distinguishes, the smallest change of a picture decides; a probe of such an
answer says more about the list than about the model. How near is too near depends on the model: text features of one
CLIP lie in a narrow cone, of another all over the sphere. So the yardstick is taken from the model itself: how far
apart two wordings of one label are, beyond what a wording does to every label alike (which no answer depends on). In
the terms of a two-way analysis of variance of label and wording, this is their interaction.

Letters: K labels, T wordings, W reference words, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .ensembles import named_templates
from .text import clean_text, prompts

WORDINGS = named_templates("simple")
WORDS = (
    *("dog", "cat", "bird", "horse", "person", "flower", "tree", "mountain"),
    *("house", "table", "cup", "shoe", "book", "phone", "car", "boat"),
)
NEAR = 2.0  # wordings: nearer labels are near-synonyms
RELATED = 3.0  # wordings: nearer labels overlap where one's name ends with the other's


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Two labels to think about. wordings: their distance, in distances of two wordings of one label."""

    kind: Literal["near_synonyms", "overlap"]
    labels: tuple[str, str]
    similarity: float
    wordings: float

    @property
    def statement(self) -> str:
        """What was found, in one sentence."""
        one, other = self.labels
        if self.kind == "overlap":
            return f"every {other!r} is a {one!r} too, by its name: a picture of one may rightly be called either"
        return (
            f"the model tells {one!r} from {other!r} hardly better ({self.wordings:.1f} times) than two wordings of "
            "one label: the smallest change of a picture may decide between them"
        )


def wording_distance(encode: Callable[[Sequence[str]], Tensor]) -> float:
    """The distance of two wordings of one label, beyond what they do to every label: the yardstick of `lint`.

    encode: texts -> unit features [N, D]. Two-way analysis of variance without replication: the root of the
    interaction's mean square over (W - 1)(T - 1) degrees of freedom, times the root of 2 for a difference of two.
    """
    features = encode(prompts(WORDS, WORDINGS)).double().view(len(WORDS), len(WORDINGS), -1)
    by_word, by_wording = features.mean(dim=1, keepdim=True), features.mean(dim=0, keepdim=True)
    interaction = features - by_word - by_wording + features.mean(dim=(0, 1), keepdim=True)
    freedom = (len(WORDS) - 1) * (len(WORDINGS) - 1)
    return float((2 * interaction.square().sum() / freedom).sqrt())


def lint(labels: Sequence[str], features: Tensor, wording: float, most: int = 100) -> list[Finding]:
    """The nearest pairs first, `most` at most. features: unit, [K, D]; wording: of `wording_distance`, above 0.

    near_synonyms: nearer than NEAR wordings. overlap: one label's name ends with the other's ("cat", "black cat": in
    English a kind of cat), and they are nearer than RELATED wordings, which lets "hot dog" pass where the model knows.
    """
    similarity = features @ features.T
    distance = (2 - 2 * similarity).clamp(min=0).sqrt() / max(wording, 1e-9)
    overlapping = [(i, j) for i, j in _contained(labels) if distance[i, j] < RELATED]
    kinds: dict[tuple[int, int], Literal["near_synonyms", "overlap"]] = dict.fromkeys(overlapping, "overlap")
    for i, j in _nearest(distance, most + len(overlapping)):
        if (i, j) not in kinds and (j, i) not in kinds:
            kinds[i, j] = "near_synonyms"
    found = [
        Finding(
            kind=kind,
            labels=(labels[i], labels[j]),
            similarity=float(similarity[i, j]),
            wordings=float(distance[i, j]),
        )
        for (i, j), kind in kinds.items()
    ]
    return sorted(found, key=lambda finding: finding.wordings)[:most]


def _nearest(distance: Tensor, most: int) -> list[tuple[int, int]]:
    """The pairs nearer than NEAR, `most` at most, the nearest ones. distance: [K, K], symmetric."""
    first, second = torch.triu_indices(len(distance), len(distance), offset=1)
    between = distance[first, second]
    values, places = between.topk(min(most, len(between)), largest=False)
    places = places[values < NEAR]
    return list(zip(first[places].tolist(), second[places].tolist(), strict=True))


def _contained(labels: Sequence[str]) -> list[tuple[int, int]]:
    """Positions of labels of which the second's words end with the first's."""
    words = [tuple(clean_text(label).split()) for label in labels]
    position = {one: index for index, one in enumerate(words)}
    return [
        (position[one[start:]], index)
        for index, one in enumerate(words)
        for start in range(1, len(one))
        if one[start:] in position
    ]
