"""Pools of threads that compute."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch


def thread_pool(name: str, workers: int, torch_threads: int, *, yielding: bool = False) -> ThreadPoolExecutor:
    """Threads that each compute with `torch_threads`; yielding: the processor goes to others first (Linux)."""

    def prepare() -> None:
        if yielding and sys.platform == "linux":  # there, priorities are a thread's, and those it starts inherit it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        torch.set_num_threads(torch_threads)

    return ThreadPoolExecutor(workers, thread_name_prefix=name, initializer=prepare)
