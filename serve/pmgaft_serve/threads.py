"""Pools of threads that compute."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

ANSWERING = 10
"""What is added to the niceness of what computes for answers: the event loop and TorchServe, which only pass things on,
come first, so that a full server refuses at once."""

PROBING = 19
"""What is added to that of attacks: answers come first."""


def thread_pool(name: str, workers: int, torch_threads: int, niceness: int = ANSWERING) -> ThreadPoolExecutor:
    """Threads that each compute with `torch_threads`. niceness: on top of the process's own; who is nicer leaves the
    processor to others (on Linux alone).
    """

    def prepare() -> None:
        if sys.platform == "linux":  # there, niceness is a thread's, and those it starts inherit it
            os.nice(niceness)
        torch.set_num_threads(torch_threads)

    return ThreadPoolExecutor(workers, thread_name_prefix=name, initializer=prepare)
