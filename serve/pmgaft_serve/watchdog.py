"""A worker that hangs is ended, so that TorchServe starts another.

Each worker's event loop counts in a file (`beat`); the launcher looks at it once a second (`Watchdog`), and ends a
worker whose count has stood still for so many of its own looks. No clock is compared: where the system's clock jumps,
or where everything was paused for a while and goes on, nobody is taken for dead.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import signal
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
_COUNT = struct.Struct("=Q")


def pulse_file(directory: Path, pid: int) -> Path:
    """Where worker `pid` counts."""
    return directory / f"pulse-{pid}"


async def beat(file: Path) -> None:
    """Count in `file`, for ever; it lies in memory, so that a full disk cannot stop it."""
    file.write_bytes(bytes(_COUNT.size))
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), _COUNT.size) as memory:
        count = 0
        while True:
            count += 1
            _COUNT.pack_into(memory, 0, count)
            await asyncio.sleep(LOOK_SECONDS / 2)


class Watchdog:
    """Looks at the workers in a thread of its own, until closed. workers: their process ids. looks: without a beat."""

    def __init__(self, directory: Path, workers: Callable[[], Sequence[int]], looks: int) -> None:
        self._directory = directory
        self._workers = workers
        self._looks = looks
        self._seen: dict[int, tuple[int, int]] = {}  # by process id: its count, and since how many looks
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._closed.set()
        self._thread.join()

    def look(self) -> None:
        """Once, at every worker that has begun to count: while it loads a model, nothing can be said of it."""
        counts = {pid: count for pid in self._workers() if (count := self._count(pid)) is not None}
        known = self._seen
        self._seen = {
            pid: (count, known[pid][1] + 1 if pid in known and known[pid][0] == count else 0)
            for pid, count in counts.items()
        }
        for pid, (_, looks) in self._seen.items():
            if looks >= self._looks:
                logger.error("worker process %d has hung for %d seconds and is ended", pid, looks * LOOK_SECONDS)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                pulse_file(self._directory, pid).unlink(missing_ok=True)

    def _count(self, pid: int) -> int | None:
        try:
            (count,) = _COUNT.unpack(pulse_file(self._directory, pid).read_bytes())
        except (OSError, struct.error):
            return None
        return int(count)

    def _run(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            self.look()
