"""The state of an evaluation under way: a directory of finished parts, so that a killed one can go on.

WORK/asked.json                        what was asked, to the last setting that decides an outcome
WORK/ASKED/SET/part-00012.safetensors  the outcomes of one part; ASKED is the hash of what was asked
WORK/ASKED/SET/checks.json             the self-checks of one set

Everything is written beside its place and renamed: what is there is whole. Machines need not share the directory: each
rank goes on with the parts it finds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from pmgaft.errors import InputError
from pmgaft.evaluation.run import Outcomes

_ASKED = "asked.json"


class Work:
    """One evaluation's parts; several processes may write different ones."""

    def __init__(self, directory: Path, asked: Mapping[str, Any]) -> None:
        self.directory, self.asked = directory, asked
        self._parts = directory / hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]

    def begin(self, *, resume: bool, force: bool) -> None:
        """Take up what is there, or start anew.

        Raises: InputError where an unfinished evaluation is there and neither is asked for, or `resume` is and it
        asked for something else.
        """
        file = self.directory / _ASKED
        if file.is_file() and not force:
            if not resume:
                message = (
                    f"{self.directory} holds an unfinished evaluation; go on with --resume, or drop it with --force"
                )
                raise InputError(message)
            differing = differences(json.loads(file.read_text(encoding="utf-8")), self.asked)
            if differing:
                raise InputError(
                    f"{self.directory} was begun with another {', '.join(differing)}; drop it with --force"
                )
            return
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        write_atomically(file, json.dumps(self.asked, indent=2).encode())

    def outcomes(self, name: str, part: int) -> Outcomes | None:
        """A part that was finished before."""
        try:
            return Outcomes(**safetensors.torch.load_file(self._part(name, part)))
        except (OSError, SafetensorError, TypeError):  # not there, or not whole: done anew
            return None

    def keep(self, name: str, part: int, outcomes: Outcomes) -> None:
        """Remember a finished part."""
        tensors = {field: getattr(outcomes, field).contiguous() for field in Outcomes.__dataclass_fields__}
        write_atomically(self._part(name, part), safetensors.torch.save(tensors))

    def checks(self, name: str) -> list[dict[str, Any]] | None:
        """The self-checks of a set, if they were made before."""
        file = self._parts / name / "checks.json"
        found: list[dict[str, Any]] | None = json.loads(file.read_text("utf-8")) if file.is_file() else None
        return found

    def keep_checks(self, name: str, checks: list[dict[str, Any]]) -> None:
        """Remember them."""
        write_atomically(self._parts / name / "checks.json", json.dumps(checks).encode())

    def finish(self) -> None:
        """Nothing is left to go on with."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _part(self, name: str, part: int) -> Path:
        return self._parts / name / f"part-{part:05d}.safetensors"


def write_atomically(path: Path, content: bytes) -> None:
    """All of it or nothing, whenever the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(content)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The names of what differs, such as "protocol.seed"."""
    found: list[str] = []
    for key in sorted(one.keys() | other.keys()):
        mine, theirs = one.get(key), other.get(key)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            found += differences(mine, theirs, f"{prefix}{key}.")
        elif mine != theirs:
            found.append(prefix + key)
    return found
