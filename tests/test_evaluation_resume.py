"""An evaluation killed at any moment goes on where it was, and several processes find what one finds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from pmgaft.cli import main

HOW = ["--eps", "0.5/255,1/255", "--attack", "pgd-ce:2", "--attack", "pgd-margin:2", "--batch-size", "2"]


def evaluate(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["evaluate", *arguments])


@pytest.fixture(scope="module")
def asked(tiny_vit_clip_dir: Path, shards: Path) -> list[str]:
    """Two sets of three and six parts of four images."""
    sets = ["--dataset", str(shards), "--dataset", str(shards / "train-00.parquet")]
    return [f"local-dir:{tiny_vit_clip_dir}", *sets, *HOW, "--device", "cpu", "--check-images", "1"]


@pytest.fixture(scope="module")
def whole(asked: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an evaluation finds that nobody disturbs."""
    output = tmp_path_factory.mktemp("whole") / "whole.json"
    assert evaluate(*asked, "--output", str(output)).exit_code == 0
    return found(output)


def found(output: Path) -> dict[str, Any]:
    """All that a result says but for times and file names."""
    result = json.loads(output.read_text())
    sets = [{key: value for key, value in entry.items() if key != "seconds"} for entry in result["sets"]]
    rows = pq.read_table(output.parent / result["outcomes"]).to_pylist()
    return {"sets": sets, "average": result["average"], "rows": rows, "asked": result["asked"]}


KILLED = """
import os, signal, sys
from pmgaft.cli import main
from pmgaft.evaluation import work
keep, kept = work.Work.keep, []
def dying(self, name, part, outcomes):
    if len(kept) == int(sys.argv[1]):
        self._part(name, part).with_name(".part-scratch").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    kept.append(part)
    keep(self, name, part, outcomes)
work.Work.keep = dying
main(["evaluate", *sys.argv[2:]])
"""


def test_killed_in_the_middle_it_goes_on_and_ends_as_if_nothing_had_been(
    asked: list[str], whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "result.json"
    command = [sys.executable, "-c", KILLED, "5", *asked, "--output", str(output)]
    assert subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    assert not output.exists()
    parts = sorted((tmp_path / "result.parts").rglob("part-*.safetensors"))
    assert len(parts) == 5
    parts[0].write_bytes(parts[0].read_bytes()[:40])  # a disk may lose what was written last

    again = evaluate(*asked, "--output", str(output))
    assert again.exit_code == 2
    assert "--resume" in again.stderr
    other = evaluate(*asked, "--output", str(output), "--resume", "--seed", "1", "--limit", "3")
    assert other.exit_code == 2
    assert "limit, protocol.seed" in other.stderr

    judged: list[int] = []
    monkeypatch.setattr("pmgaft.evaluation.session._OfSet.judged", counting(judged))
    done = evaluate(*asked, "--output", str(output), "--resume")
    assert done.exit_code == 0, done.output
    assert found(output) == whole
    assert sum(judged) == 36 - 16  # five parts of four images were there, one of them damaged
    assert not (tmp_path / "result.parts").exists()

    judged.clear()
    assert evaluate(*asked, "--output", str(output), "--resume").exit_code == 0
    assert judged == []  # finished: shown again, and nothing done


def counting(judged: list[int]) -> Any:
    from pmgaft.evaluation.session import _OfSet

    real = _OfSet.judged

    def count(self: Any, pictures: Any, tell: Any) -> Any:
        judged.append(len(pictures))
        return real(self, pictures, tell)

    return count


def test_two_processes_find_what_one_finds(asked: list[str], whole: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "pmgaft", "evaluate", *asked, "--output", str(output)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert found(output) == whole
    assert "2 processes" in done.stderr
    assert done.stdout.count("huge_eps") == 1  # the first rank alone speaks
