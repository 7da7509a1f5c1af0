"""The installed package on a bare Debian: no Java, no compiler, no git, nobody's account, read-only but for /tmp."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.system,
    pytest.mark.e2e,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("debootstrap") is None, reason="debootstrap is missing (apt install debootstrap)"),
    pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="debootstrap needs root"),
]

ROOT = Path(__file__).parent.parent
SUITE = "bookworm"
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
NOTHING_ELSE = ("env", "-i", "PATH=/usr/bin:/bin", "HOME=/tmp", "PYTHONDONTWRITEBYTECODE=1")
SCENE = """
import shutil
from pmgaft_export.shipped import bundle_for
from pmgaft_serve.bench import picture
from pmgaft_serve.client import Client, Question
from pmgaft_serve.torchserve import ServeOptions, serving

assert not any(map(shutil.which, ("java", "cc", "gcc", "git"))), "this system is not bare"
bundle = bundle_for("mini")
with serving(ServeOptions(bundle=bundle, port=0, start_seconds=600)) as server, Client(server.url) as client:
    question = Question(labels=["cat", "dog"], probe={"eps": "1/255", "steps": 2})
    print("verdict", client.classify(picture(300, 200), question).probe.verdict)
"""


@pytest.fixture(scope="module")
def debian() -> Iterator[Path]:
    """A minimal system: Debian's essential packages, and Python's for the libraries that any Python needs."""
    with tempfile.TemporaryDirectory(prefix="pmgaft-debian-") as directory:
        command = ["debootstrap", "--variant=minbase", "--include=python3", SUITE, directory]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
        yield Path(directory)


def test_a_shipped_model_is_exported_served_and_probed_by_nobody(debian: Path) -> None:
    for path in (sys.base_prefix, sys.prefix, ROOT):
        place(debian, Path(path)).mkdir(parents=True, exist_ok=True)
        for parent in Path(path).parents:
            place(debian, parent).chmod(0o755)
    commands = [
        *(["mount", "--bind", "-o", "ro", path, place(debian, path)] for path in (sys.base_prefix, sys.prefix, ROOT)),
        *(["mount", "--rbind", path, place(debian, path)] for path in ("/proc", "/dev")),
        ["chroot", debian, *NOBODY, *NOTHING_ELSE, sys.executable, "-c", SCENE],
    ]
    script = " && ".join(shlex.join(map(str, command)) for command in commands)
    mounted = ["unshare", "--mount", "sh", "-c", script]  # the mounts end with it
    told = subprocess.run(mounted, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout[-2000:] + told.stderr[-4000:]
    assert "verdict " in told.stdout


def place(debian: Path, path: str | Path) -> Path:
    """Where a path of this system lies in that one."""
    return debian / Path(path).relative_to("/")
