"""The watchdog: who hangs is ended, and nobody else, whatever the clock says."""

import asyncio
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmgaft_serve import watchdog
from pmgaft_serve.watchdog import Watchdog, beat, pulse_file

LOOKS = 3


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """Something to be ended."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as started:
        yield started
        started.kill()


@pytest.fixture
def dog(tmp_path: Path, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Watchdog]:
    """One that only looks when it is told to."""
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 3600.0)
    made = Watchdog(tmp_path, lambda: [process.pid], LOOKS)
    yield made
    made.close()


def count(directory: Path, pid: int, value: int) -> None:
    pulse_file(directory, pid).write_bytes(struct.pack("=Q", value))


def test_a_worker_that_counts_lives_and_one_that_stops_is_ended(
    dog: Watchdog, process: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    for value in range(3 * LOOKS):
        count(tmp_path, process.pid, value)
        dog.look()
    for _ in range(LOOKS - 1):
        dog.look()
    assert process.poll() is None
    dog.look()
    assert process.wait(10) == -signal.SIGKILL


def test_a_beat_in_time_starts_the_looks_anew(dog: Watchdog, process: subprocess.Popen[bytes], tmp_path: Path) -> None:
    for value in range(3):
        count(tmp_path, process.pid, value)
        for _ in range(LOOKS):
            dog.look()
    assert process.poll() is None


def test_a_worker_that_has_not_begun_to_count_is_left_to_load_its_model(
    dog: Watchdog, process: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    for _ in range(2 * LOOKS):
        dog.look()
    pulse_file(tmp_path, process.pid).touch()  # it is about to
    for _ in range(2 * LOOKS):
        dog.look()
    assert process.poll() is None


def test_neither_a_jumping_clock_nor_a_long_pause_of_everything_ends_anybody(
    dog: Watchdog, process: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count(tmp_path, process.pid, 1)
    dog.look()
    for name in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: 1e12)
    dog.look()
    assert process.poll() is None


def test_a_worker_that_ended_by_itself_is_no_mistake(
    dog: Watchdog, process: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    count(tmp_path, process.pid, 1)
    process.kill()
    process.wait()
    for _ in range(LOOKS + 1):
        dog.look()


def test_a_worker_counts_while_its_loop_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.01)
    file = pulse_file(tmp_path, os.getpid())

    async def scene() -> list[bytes]:
        beating = asyncio.create_task(beat(file))
        seen: list[bytes] = []
        while len(set(seen)) < 3:
            await asyncio.sleep(0.01)
            seen.append(file.read_bytes())
        beating.cancel()
        return seen

    seen = asyncio.run(asyncio.wait_for(scene(), 20))
    assert seen == sorted(seen, key=lambda value: struct.unpack("=Q", value))
