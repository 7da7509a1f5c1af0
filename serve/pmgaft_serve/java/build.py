"""Compiles the classes that mend TorchServe into mended.jar: `python build.py` after a change.

TorchServe gets no more releases, so they ship compiled, for Java 17 and later; a test compares each source's hash with
the one in the jar. Needs a JDK (javac) of 17 or later.
"""

import hashlib
import importlib.util
import subprocess
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
JAR = HERE / "mended.jar"


def main() -> None:
    """Writes mended.jar: the classes, and a manifest that names each one's source by sha256."""
    ts = importlib.util.find_spec("ts")
    if ts is None or ts.origin is None:
        raise SystemExit("torchserve is not installed")
    torchserve = Path(ts.origin).parent / "frontend" / "model-server.jar"
    sources = sorted(HERE.rglob("*.java"))
    names = [source.relative_to(HERE).with_suffix(".class").as_posix() for source in sources]
    manifest = "Manifest-Version: 1.0\r\n\r\n"
    for source, name in zip(sources, names, strict=True):
        manifest += f"Name: {name}\r\nSource-Sha256: {hashlib.sha256(source.read_bytes()).hexdigest()[:32]}\r\n\r\n"
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["javac", "--release", "17", "-cp", torchserve, "-d", directory, *sources], check=True)
        with zipfile.ZipFile(JAR, "w", zipfile.ZIP_DEFLATED) as jar:
            jar.writestr(zipfile.ZipInfo("META-INF/MANIFEST.MF"), manifest)
            for name in names:
                jar.writestr(zipfile.ZipInfo(name), (Path(directory) / name).read_bytes())


if __name__ == "__main__":
    main()
