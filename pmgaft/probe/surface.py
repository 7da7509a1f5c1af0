"""What a probe attacks: pixels to the logits of each row's own label list, and to those of its groups of synonyms.

Letters: B rows of the batch, n of them in play, K_b labels of row b, K the longest list, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Groups = tuple[tuple[int, ...], ...]
"""Positions of labels that count as one answer; labels in no group stand for themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """Rows with unlike label lists, as one function of pixels.

    encode: differentiable, pixels float32 [n, 3, H, W] -> unit features [n, D]. texts: unit features [B, K, D], padded.
    absent: bool [B, K], true where a row's list is shorter. leads: int64 [B, K], for each label the first label of its
    group; None where no row has groups.
    """

    encode: Callable[[Tensor], Tensor]
    scale: float
    texts: Tensor
    absent: Tensor
    leads: Tensor | None

    @classmethod
    def of(
        cls,
        encode: Callable[[Tensor], Tensor],
        scale: float,
        text_features: Sequence[Tensor],
        groups: Sequence[Groups],
    ) -> Surface:
        """text_features: unit, [K_b, D] each. groups: one value a row; no label may be in two of them."""
        texts = torch.nn.utils.rnn.pad_sequence(list(text_features), batch_first=True)
        sizes = torch.tensor([len(t) for t in text_features], device=texts.device)
        absent = torch.arange(texts.shape[1], device=texts.device) >= sizes[:, None]
        leads = None
        if any(groups):
            leads = torch.tensor([leads_of(row, texts.shape[1]) for row in groups], device=texts.device)
        return cls(encode=encode, scale=scale, texts=texts, absent=absent, leads=leads)

    def logits(self, pixels: Tensor, rows: Tensor) -> Tensor:
        """pixels: [n, 3, H, W]; rows: int64 [n] -> [n, K], -inf where a row has no such label."""
        logits = self.scale * torch.einsum("nd,nkd->nk", self.encode(pixels), self.texts[rows])
        return logits.masked_fill(self.absent[rows], -torch.inf)

    def answers(self, pixels: Tensor, rows: Tensor) -> Tensor:
        """As `logits`, each group's largest logit standing at the place of its first label, its others being -inf."""
        return self.grouped(self.logits(pixels, rows), rows)

    def grouped(self, logits: Tensor, rows: Tensor) -> Tensor:
        """[n, K] -> [n, K]: from labels to answers."""
        if self.leads is None:
            return logits
        return torch.full_like(logits, -torch.inf).scatter_reduce(1, self.leads[rows], logits, "amax")


def leads_of(groups: Groups, count: int) -> list[int]:
    """For each of so many labels, the first label of its group: its own position where it is in none."""
    leads = list(range(count))
    for group in groups:
        for position in group:
            leads[position] = min(group)
    return leads
