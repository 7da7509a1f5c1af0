"""The shipped weights. The two models share one text tower, so each is put together on demand.

Files: `NAME.safetensors` (image tower, keys "visual.*"), `text.safetensors` (all the rest), both half precision, and
one `open_clip_config.json`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch

from pmgaft.errors import ModelError

NAMES = ("mini", "mini-robust")

HERE = Path(__file__).parent


@contextmanager
def local_dir(name: str) -> Iterator[Path]:
    """A temporary directory with the shipped model `name` in open_clip's local-dir form.

    Raises: ModelError if one is missing.
    """
    files = [HERE / f"{name}.safetensors", HERE / "text.safetensors", HERE / "open_clip_config.json"]
    for file in files:
        if not file.is_file():
            raise ModelError(f"the shipped model {name} is incomplete: {file} is missing", field="model")
    image, text, config = files
    state = safetensors.torch.load_file(image) | safetensors.torch.load_file(text)
    with tempfile.TemporaryDirectory(prefix="pmgaft-zoo-") as directory:
        safetensors.torch.save_file(state, Path(directory) / "open_clip_model.safetensors")
        shutil.copy(config, directory)
        yield Path(directory)
