"""Labels -> features. Named sets lie ready, other known labels come from the cache, and what all waiting requests are
missing is encoded together. Letters: K labels, D features.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from pmgaft.clip.text import mean_over_templates, prompts
from pmgaft.errors import LabelsError

from .batching import Batcher
from .label_sets import LabelSet
from .metrics import Metrics
from .text_cache import Lookup, Templates, TextCache

TEXTS_AT_ONCE = 256  # of one call of the encoder; a request that needs more takes turns with the others


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Some labels that one request is missing."""

    labels: Sequence[str]
    templates: Templates


class TextModel(Protocol):
    """Texts -> unit features, and what that costs; `pmgaft.clip.text.TextEncoder` is one."""

    @property
    def context_length(self) -> int:
        """Tokens that a text can have."""

    def tokens(self, texts: Sequence[str]) -> int:
        """That encoding these takes, padding included."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Unit features [N, D]."""


class Texts:
    """What the service knows of labels.

    encoder: run in `thread`. most_bytes: of the cache. most_texts, most_tokens: texts (labels times templates), and
    these times the longest one's tokens, that one request may ask to be encoded; known ones cost next to nothing and
    are not counted.
    """

    def __init__(
        self,
        encoder: TextModel,
        thread: Executor,
        metrics: Metrics,
        *,
        most_bytes: int,
        most_texts: int,
        most_tokens: int,
    ) -> None:
        self._encoder = encoder
        self._thread = thread
        self._metrics = metrics
        self._most_texts, self._most_tokens = most_texts, most_tokens
        self._cache = TextCache(most_bytes)
        self._sets: dict[tuple[str, Templates], Tensor] = {}
        self._batcher = Batcher(self._work, thread, TEXTS_AT_ONCE)

    def warm_up(self, sets: Sequence[LabelSet], warm: Sequence[LabelSet]) -> None:
        """Encode named sets, which are kept for good, and other labels, which are kept in the cache. Waits."""
        for one in warm:
            self._thread.submit(self._encode_list, one).result()
        for one in sets:
            self._sets[one.name, one.templates] = self._thread.submit(self._encode_list, one).result()

    async def features(
        self,
        labels: Sequence[str],
        templates: Templates,
        label_set: str | None = None,
        most_tokens: int | None = None,
    ) -> Tensor:
        """float32 [K, D], in the order of `labels`; `label_set`: the set they all came from, if they did.

        most_tokens: where fewer than usual may be encoded for this request.
        Raises: LabelsError (texts_too_many, tokens_too_many, label_too_long).
        """
        if label_set is not None and (known := self._sets.get((label_set, templates))) is not None:
            self._count(len(labels), 0)
            return known
        found = self._cache.look_up(labels, templates)
        self._count(len(found.known), len(found.missing))
        if not found.missing:
            return found.features
        missing = _missing(labels, found)
        await self._check_budget(missing, templates, self._most_tokens if most_tokens is None else most_tokens)
        at_once = max(1, TEXTS_AT_ONCE // len(templates))
        pieces = [
            _Piece(labels=missing[start : start + at_once], templates=templates)
            for start in range(0, len(missing), at_once)
        ]
        answers = await asyncio.gather(
            *(
                self._batcher(piece, weight=len(piece.labels) * len(templates), turn=turn)
                for turn, piece in enumerate(pieces)
            )
        )
        return _put_together(found, [row for features, _ in answers for row in features])

    async def _check_budget(self, labels: Sequence[str], templates: Templates, most_tokens: int) -> None:
        texts = len(labels) * len(templates)
        told = f"{len(labels):,} labels that this server has not seen, times {len(templates)} templates, make"
        if texts > self._most_texts:
            message = f"{told} {texts:,} texts to encode; at most {self._most_texts:,} are allowed in one request"
            raise LabelsError(message, field="labels", code="texts_too_many")
        if texts * self._encoder.context_length <= most_tokens:
            return  # without counting
        count = partial(self._encoder.tokens, prompts(labels, templates))
        tokens = await asyncio.get_running_loop().run_in_executor(self._thread, count)
        if tokens > most_tokens:
            message = (
                f"{told} {tokens:,} tokens to encode; at most {most_tokens:,} are allowed beside this request's "
                "images: send the labels in several requests, after which they are known"
            )
            raise LabelsError(message, field="labels", code="tokens_too_many")

    def _work(self, pieces: Sequence[_Piece]) -> list[Tensor]:
        """The features of each piece, [K, D]. Runs in the text thread, and is the only one that stores."""
        found = [self._cache.look_up(piece.labels, piece.templates) for piece in pieces]
        wanted: dict[Templates, dict[str, None]] = {}
        for piece, known in zip(pieces, found, strict=True):
            if known.missing:
                wanted.setdefault(piece.templates, {}).update(dict.fromkeys(_missing(piece.labels, known)))
        fresh = self._encode_all({templates: list(labels) for templates, labels in wanted.items()})
        return [
            _put_together(known, [fresh[piece.templates][label] for label in _missing(piece.labels, known)])
            for piece, known in zip(pieces, found, strict=True)
        ]

    def _encode_all(self, wanted: dict[Templates, list[str]]) -> dict[Templates, dict[str, Tensor]]:
        """Unknown labels' features, by one call of the encoder; from now on they are known."""
        texts = [text for templates, labels in wanted.items() for text in prompts(labels, templates)]
        if not texts:
            return {}
        encoded = self._encoder.encode(texts)
        self._metrics.count("pmgaft_texts_encoded_total", len(texts))
        fresh, forgotten = {}, self._cache.forgotten
        for templates, labels in wanted.items():
            count = len(labels) * len(templates)
            features, encoded = mean_over_templates(encoded[:count], len(templates)), encoded[count:]
            self._cache.store(labels, templates, features)
            fresh[templates] = dict(zip(labels, features, strict=True))
        self._metrics.count("pmgaft_label_cache_evictions_total", self._cache.forgotten - forgotten)
        self._metrics.set("pmgaft_label_cache_bytes", self._cache.bytes)
        self._metrics.set("pmgaft_label_cache_labels", len(self._cache))
        return fresh

    def _encode_list(self, labels: LabelSet) -> Tensor:
        """A whole list, some at a time. Runs in the text thread."""
        at_once = max(1, TEXTS_AT_ONCE // len(labels.templates))
        parts = [
            self._work([_Piece(labels=labels.labels[start : start + at_once], templates=labels.templates)])[0]
            for start in range(0, len(labels.labels), at_once)
        ]
        return torch.cat(parts)

    def _count(self, known: int, missing: int) -> None:
        self._metrics.count("pmgaft_label_cache_hits_total", known)
        self._metrics.count("pmgaft_label_cache_misses_total", missing)


def _missing(labels: Sequence[str], found: Lookup) -> list[str]:
    return [labels[position] for position in found.missing]


def _put_together(found: Lookup, missing: Sequence[Tensor]) -> Tensor:
    """Known features and newly encoded ones, each [D], in the order of the list."""
    if not found.missing:
        return found.features
    rows = torch.stack(list(missing))
    features = torch.empty(len(found.known) + len(found.missing), rows.shape[1])
    features[found.missing] = rows
    if found.known:
        features[found.known] = found.features
    return features
