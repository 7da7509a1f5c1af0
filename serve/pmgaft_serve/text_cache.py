"""Label features, kept: encoding a label costs more than all else about it. Letters: K labels, D features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import torch
from torch import Tensor

_ENTRY_BYTES = 300  # what Python's objects around one label take, roughly

Templates = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """What the cache knew about a list of labels.

    features: float32 [known, D], the known labels' in the list's order. known, missing: positions in the list.
    """

    features: Tensor
    known: list[int]
    missing: list[int]


@dataclass(slots=True)
class _Group:
    """The labels kept in one list of templates: label -> row."""

    templates: Templates
    rows: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return 4 * sum(map(len, self.templates)) + _ENTRY_BYTES


class TextCache:
    """Features by (label, templates), the least recently used forgotten first. Any thread may call.

    All features lie in one matrix, so that a list of known labels is one gather, whatever its length. The matrix is
    reserved in full at the first `store`; memory is only taken where something was written.
    most_bytes: bound on all that is kept, labels and templates included. Where it is reached, an eighth is freed.
    bytes: that are kept now. forgotten: how many features had to make room so far.
    """

    def __init__(self, most_bytes: int = 256 * 2**20) -> None:
        self._most_bytes = most_bytes
        self._groups: dict[Templates, _Group] = {}
        self._matrix = torch.empty(0, 0)
        self._owners: list[tuple[_Group, str] | None] = []  # row -> whose it is
        self._used = torch.empty(0, dtype=torch.int64)  # row -> when it was last asked for
        self._free: list[int] = []  # rows below len(_owners) that are nobody's
        self._clock = 0
        self._lock = Lock()
        self.bytes = 0
        self.forgotten = 0

    def __len__(self) -> int:
        """How many features are kept."""
        return len(self._owners) - len(self._free)

    def look_up(self, labels: Sequence[str], templates: Templates) -> Lookup:
        """What is known of these labels. Quick: a dictionary look-up a label, then one gather."""
        with self._lock:
            self._clock += 1
            group = self._groups.get(templates)
            found = list(map(group.rows.get, labels)) if group else [None] * len(labels)
            rows = torch.from_numpy(np.array([row for row in found if row is not None], dtype=np.int64))
            self._used.index_fill_(0, rows, self._clock)
            features = self._matrix.index_select(0, rows)  # in a quarter of the time that indexing takes
        if len(rows) == len(found):
            return Lookup(features=features, known=list(range(len(found))), missing=[])
        known = [position for position, row in enumerate(found) if row is not None]
        missing = [position for position, row in enumerate(found) if row is None]
        return Lookup(features=features, known=known, missing=missing)

    def store(self, labels: Sequence[str], templates: Templates, features: Tensor) -> None:
        """Keep features, float32 [K, D]; for what does not fit, what was used longest ago is forgotten."""
        with self._lock:
            if not len(self._matrix):
                rows = self._most_bytes // (_ENTRY_BYTES + features[0].nbytes) + 1  # that the bound allows at most
                self._matrix = torch.empty(rows, features.shape[1])
                self._used = torch.zeros(rows, dtype=torch.int64)
            for label, feature in zip(labels, features, strict=True):
                self._keep(label, templates, feature)

    def _keep(self, label: str, templates: Templates, feature: Tensor) -> None:
        group = self._groups.get(templates)
        if group is not None and label in group.rows:
            return
        size = self._size(label) + _Group(templates).bytes
        if self.bytes + size > self._most_bytes:
            self._forget(self._most_bytes * 7 // 8 - size)
            group = self._groups.get(templates)
            if self.bytes + size > self._most_bytes:
                return
        if group is None:
            group = self._groups[templates] = _Group(templates)
            self.bytes += group.bytes
        if self._free:
            row = self._free.pop()
            self._owners[row] = (group, label)
        else:
            row = len(self._owners)
            self._owners.append((group, label))
        self._matrix[row] = feature
        self._used[row] = self._clock
        group.rows[label] = row
        self.bytes += self._size(label)

    def _size(self, label: str) -> int:
        return self._matrix.shape[1] * self._matrix.element_size() + 4 * len(label) + _ENTRY_BYTES

    def _forget(self, most_bytes: int) -> None:
        """Down to a number of bytes, what was used longest ago first."""
        for row in self._used[: len(self._owners)].argsort(stable=True).tolist():
            if self.bytes <= most_bytes:
                return
            if (owner := self._owners[row]) is None:
                continue
            group, label = owner
            del group.rows[label]
            self._owners[row] = None
            self._free.append(row)
            self.forgotten += 1
            self.bytes -= self._size(label)
            if not group.rows:
                del self._groups[group.templates]
                self.bytes -= group.bytes
