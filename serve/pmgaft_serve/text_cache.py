"""Label features, kept: encoding a label costs more than all else about it. Letters: K labels, D features."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

_ENTRY_BYTES = 400  # what Python's objects around one feature take, roughly

Key = tuple[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """What the cache knew. features: those it had, by label; missing: the labels it had not, in order."""

    features: dict[str, Tensor]
    missing: tuple[str, ...]


class TextCache:
    """Features by (label, templates), the least recently used forgotten first.

    encode: (labels, templates) -> float32 [K, D]. most_bytes: bound on all that is kept.
    Any thread may call. Labels that two callers miss at once are encoded once, as long as `fill` runs in one thread.
    """

    def __init__(self, encode: Callable[[Sequence[str], Sequence[str]], Tensor], most_bytes: int = 256 * 2**20) -> None:
        self._encode = encode
        self._most_bytes = most_bytes
        self._entries: OrderedDict[Key, Tensor] = OrderedDict()
        self._lock = Lock()
        self.bytes = 0

    def look_up(self, labels: Sequence[str], templates: tuple[str, ...]) -> Lookup:
        """What is known of these labels. Quick."""
        found: dict[str, Tensor] = {}
        missing: list[str] = []
        with self._lock:
            for label in labels:
                entry = self._entries.get((label, templates))
                if entry is None:
                    missing.append(label)
                else:
                    self._entries.move_to_end((label, templates))
                    found[label] = entry
        return Lookup(features=found, missing=tuple(missing))

    def fill(self, labels: Sequence[str], templates: tuple[str, ...]) -> dict[str, Tensor]:
        """The features of labels that were missing, encoded now unless somebody did meanwhile. Slow.

        Raises: what `encode` raises; then nothing is kept.
        """
        again = self.look_up(labels, templates)
        if not again.missing:
            return again.features
        # clone: a row of the batch would keep the whole batch in memory
        rows = [row.clone() for row in self._encode(again.missing, templates)]
        fresh = dict(zip(again.missing, rows, strict=True))
        with self._lock:
            for label, row in fresh.items():
                self._keep((label, templates), row)
        return again.features | fresh

    def features(self, labels: Sequence[str], templates: tuple[str, ...]) -> Tensor:
        """float32 [K, D], in the order of `labels`."""
        known = self.look_up(labels, templates)
        everything = known.features | (self.fill(known.missing, templates) if known.missing else {})
        return torch.stack([everything[label] for label in labels])

    def __len__(self) -> int:
        """How many features are kept."""
        return len(self._entries)

    def _keep(self, key: Key, row: Tensor) -> None:
        if key not in self._entries:
            self._entries[key] = row
            self.bytes += _size(key, row)
        while self.bytes > self._most_bytes and self._entries:
            self.bytes -= _size(*self._entries.popitem(last=False))


def _size(key: Key, row: Tensor) -> int:
    """Templates are counted as if each entry had its own: an upper bound that no request can get around."""
    label, templates = key
    return row.nbytes + 4 * (len(label) + sum(map(len, templates))) + _ENTRY_BYTES
