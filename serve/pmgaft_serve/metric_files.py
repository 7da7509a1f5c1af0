"""The files that workers count in (prometheus_client's multiprocess mode), and what becomes of a dead worker's.

Each worker has a file of each kind, KIND_PID.db. What it counted must outlive it, its files need not.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict

from .processes import alive

_KINDS: dict[str, Callable[[float, float], float] | None] = {
    "counter": float.__add__,
    "histogram": float.__add__,
    "gauge_max": max,
    "gauge_livesum": None,
}
"""How two workers' values become one; None: a dead worker's counts no more."""


def fold_dead(directory: Path) -> None:
    """Add what dead workers left to one file of each kind, KIND_dead.db, and remove theirs.

    So a worker that dies again and again leaves no more files. Where the disk has no room for that, nothing changes,
    and the next call tries again. Not for several threads at once.
    """
    for kind, together in _KINDS.items():
        dead = [file for file in directory.glob(f"{kind}_[0-9]*.db") if not alive(int(file.stem.rpartition("_")[2]))]
        if dead and together is not None:
            kept = directory / f"{kind}_dead.db"
            scratch = directory / f"{kind}_dead.new"
            values = dict[str, float]()
            for file in (*([kept] if kept.exists() else []), *dead):
                for key, value, *_ in MmapedDict.read_all_values_from_file(file):  # type: ignore[no-untyped-call]
                    values[key] = together(values[key], value) if key in values else value
            try:
                _write(scratch, values)
            except OSError:
                with suppress(OSError):
                    scratch.unlink()
                continue
            scratch.replace(kept)
        for file in dead:
            file.unlink()


def _write(path: Path, values: dict[str, float]) -> None:
    """Raises: OSError where the disk is full: the room is taken first, since a map of a file without room kills."""
    room = 8 + sum(len(key.encode()) + 32 for key in values)
    path.write_bytes(bytes(room))
    written = MmapedDict(str(path))  # type: ignore[no-untyped-call]
    for key, value in values.items():
        written.write_value(key, value, 0.0)  # type: ignore[no-untyped-call]
    written.close()  # type: ignore[no-untyped-call]
