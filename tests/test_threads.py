"""Pools of threads that compute leave the processor to those that only pass things on, and attacks to answers."""

import os
import subprocess
import sys

import pytest
import torch

from pmgaft_serve.threads import ANSWERING, PROBING, thread_pool

NICENESS = """
import os, threading
from pmgaft_serve.threads import PROBING, thread_pool
def own(): return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
with thread_pool("answer", 1, 1) as answers, thread_pool("probe", 1, 1, PROBING) as probes:
    print(own(), answers.submit(own).result(), probes.submit(own).result())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a thread's own niceness is Linux'")
@pytest.mark.parametrize("already", [0, 8])
def test_computing_is_nicer_than_the_event_loop_and_attacks_are_nicest(already: int) -> None:
    base = os.getpriority(os.PRIO_PROCESS, 0) + already
    words = ["nice", "-n", str(already), sys.executable, "-c", NICENESS]
    found = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout
    assert [int(one) for one in found.split()] == [base, base + ANSWERING, min(19, base + PROBING)]


def test_a_pool_computes_with_its_own_threads() -> None:
    with thread_pool("answer", 2, 3) as pool:
        assert pool.submit(torch.get_num_threads).result() == 3
