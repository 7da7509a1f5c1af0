"""Compiles AsyncBatchAggregator.java into async.jar. Needs a JDK (javac) of 17 or later: `python build.py`."""

import hashlib
import importlib.util
import subprocess
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
CLASS = "org/pytorch/serve/wlm/AsyncBatchAggregator"


def main() -> None:
    """Writes async.jar: the class, and a manifest that names its source by sha256."""
    source = HERE / f"{CLASS}.java"
    ts = importlib.util.find_spec("ts")
    if ts is None or ts.origin is None:
        raise SystemExit("torchserve is not installed")
    torchserve = Path(ts.origin).parent / "frontend" / "model-server.jar"
    manifest = f"Manifest-Version: 1.0\r\nSource-Sha256: {hashlib.sha256(source.read_bytes()).hexdigest()[:32]}\r\n\r\n"
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["javac", "--release", "17", "-cp", torchserve, "-d", directory, source], check=True)
        compiled = (Path(directory) / f"{CLASS}.class").read_bytes()
    with zipfile.ZipFile(HERE / "async.jar", "w", zipfile.ZIP_DEFLATED) as jar:
        jar.writestr(zipfile.ZipInfo("META-INF/MANIFEST.MF"), manifest)
        jar.writestr(zipfile.ZipInfo(f"{CLASS}.class"), compiled)


if __name__ == "__main__":
    main()
