"""What to serve, by name: a bundle as it is; a run or a shipped model, exported on first use.

Such exports lie in the user's cache (the environment variable PMGAFT_CACHE names another place), one directory for each
content of the model's files and version of pmgaft. Nothing is downloaded.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

import pmgaft
from pmgaft.clip import zoo
from pmgaft.errors import BundleError, ModelError, quote

from .bundle import MANIFEST, open_bundle, sha256_file


def bundle_for(name_or_path: str, progress: Callable[[str], None] = lambda step: None) -> Path:
    """The bundle to serve: for a bundle's directory, a run's directory, or the name of a shipped model.

    progress: called with a few words before each step of an export.
    Raises: ModelError for anything else; what `export_bundle` raises.
    """
    path = Path(name_or_path)
    if (path / MANIFEST).is_file():
        return path
    target = cache_directory() / f"{path.resolve().name}-{_key(model_files(name_or_path))}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not _is_whole(target):
            shutil.rmtree(target, ignore_errors=True)
            _export(name_or_path, target, progress)
    return target


def model_files(name_or_path: str) -> list[Path]:
    """The files that make a shipped model or a run's model what it is, in a fixed order.

    Raises: ModelError if it is neither, saying what to do.
    """
    if name_or_path in zoo.NAMES:
        names = ("open_clip_config.json", "text.safetensors", f"{name_or_path}.safetensors")
        return [Path(zoo.__file__).parent / name for name in names]
    if found := sorted(path for path in Path(name_or_path, "model").glob("*") if path.is_file()):
        return found
    raise ModelError(
        f"{quote(name_or_path, 200)} is neither a bundle nor a run nor one of {', '.join(zoo.NAMES)}; "
        "any other model becomes a bundle by `pmgaft export`"
    )


def cache_directory() -> Path:
    """Where exports made on first use lie."""
    return Path(os.environ["PMGAFT_CACHE"]) if os.environ.get("PMGAFT_CACHE") else user_cache_path("pmgaft") / "bundles"


def _key(paths: list[Path]) -> str:
    """A short name for the content of these files under this version of pmgaft."""
    content = "\n".join([pmgaft.__version__, *(f"{path.name} {sha256_file(path)}" for path in paths)])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _is_whole(directory: Path) -> bool:
    try:
        open_bundle(directory)
    except BundleError:
        return False
    return True


def _export(name_or_path: str, target: Path, progress: Callable[[str], None]) -> None:
    from pmgaft.clip.loading import load_clip

    from .build import export_bundle, source_of

    progress(f"loading {name_or_path}")
    clip = load_clip(name_or_path)
    run = None if name_or_path in zoo.NAMES else Path(name_or_path)
    export_bundle(clip, target, source=source_of(clip, run), progress=progress)
