"""What all tests share: two tiny CLIPs with random weights, pictures, and a small data set."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub: no test may fetch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw

pytest_plugins = ["running_server", "colour_service"]

CLASS_NAMES = ("red disc", "green square", "blue stripes")

_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
_EFFICIENTNET: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"timm_model_name": "test_efficientnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32},
    "text_cfg": _TEXT,
}
_VIT: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": _TEXT,
}
_PREPROCESS = {
    "mean": [0.5, 0.45, 0.4],
    "std": [0.25, 0.3, 0.35],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the developer's shell may change what is tested."""
    for name in [name for name in os.environ if name.startswith("PMGAFT_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def tiny_clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny convolutional CLIP (BatchNorm, 32 x 32 pixels, D = 24, context 16) in open_clip's local-dir form."""
    return _write_tiny(_EFFICIENTNET, tmp_path_factory.mktemp("tiny") / "tiny-efficientnet")


@pytest.fixture(scope="session")
def tiny_vit_clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT CLIP (32 x 32 pixels, D = 24, context 16) in open_clip's local-dir form."""
    return _write_tiny(_VIT, tmp_path_factory.mktemp("tiny") / "tiny-vit")


@pytest.fixture(scope="session")
def tiny_clip(tiny_clip_dir: Path) -> Any:
    """The tiny convolutional CLIP as a pmgaft.clip.loading.Clip. Shared by all tests: copy before you change it."""
    from pmgaft.clip.loading import load_clip

    return load_clip(f"local-dir:{tiny_clip_dir}")


@pytest.fixture(scope="session")
def tiny_vit_clip(tiny_vit_clip_dir: Path) -> Any:
    """The tiny ViT CLIP as a pmgaft.clip.loading.Clip. Shared by all tests: copy before you change it."""
    from pmgaft.clip.loading import load_clip

    return load_clip(f"local-dir:{tiny_vit_clip_dir}")


@pytest.fixture(scope="session")
def tiny_images() -> list[Image.Image]:
    """A dozen generated RGB pictures of different sizes; picture i shows CLASS_NAMES[i % 3]."""
    return [draw(index) for index in range(12)]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the parquet form: two train shards of 24 pictures, one test shard of 12, classes.json."""
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder / "train-00.parquet", range(24))
    write_shard(folder / "train-01.parquet", range(24, 48))
    write_shard(folder / "test.parquet", range(48, 60))
    classes = [{"index": index, "name": name} for index, name in enumerate(CLASS_NAMES)]
    (folder / "classes.json").write_text(json.dumps(classes), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def photos() -> Path:
    """A folder of real photographs with photos.json beside them, named by PMGAFT_TEST_PHOTOS; else skipped."""
    where = _PHOTOS
    if where is None or not (where / "photos.json").is_file():
        pytest.skip("PMGAFT_TEST_PHOTOS names no folder with photos.json")
    return where


_PHOTOS = Path(os.environ["PMGAFT_TEST_PHOTOS"]) if "PMGAFT_TEST_PHOTOS" in os.environ else None


def draw(index: int) -> Image.Image:
    """An RGB picture of class `index % 3` on a gradient; size, place and shade differ with `index`."""
    rng = np.random.default_rng(index)
    width, height = (int(n) for n in rng.integers(36, 72, size=2))
    ramp = np.linspace(60, 190, width)[None, :, None] * np.linspace(0.7, 1, height)[:, None, None]
    noise = rng.integers(0, 30, size=(height, width, 3))
    picture = Image.fromarray((ramp + noise).clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    left, top = (int(n) for n in rng.integers(2, 14, size=2))
    shade = int(rng.integers(150, 255))
    box = (left, top, left + 20, top + 20)
    if index % 3 == 0:
        pen.ellipse(box, fill=(shade, 20, 20))
    elif index % 3 == 1:
        pen.rectangle(box, fill=(20, shade, 20))
    else:
        for y in range(top, top + 20, 6):
            pen.line((left, y, left + 20, y), fill=(20, 20, shade), width=3)
    return picture


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The picture as the bytes of a file."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def write_shard(path: Path, indices: range) -> None:
    """A parquet shard with columns image and label."""
    table = pa.table(
        {
            "image": pa.array([encoded(draw(index)) for index in indices], pa.binary()),
            "label": pa.array([index % len(CLASS_NAMES) for index in indices], pa.int16()),
        }
    )
    pq.write_table(table, path)


def _write_tiny(model_cfg: dict[str, Any], directory: Path) -> Path:
    import open_clip

    from pmgaft.clip.loading import quietly, save_local_dir

    config = {"model_cfg": model_cfg, "preprocess_cfg": _PREPROCESS}
    directory.mkdir(parents=True)
    (directory / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.random.fork_rng(devices=[]), quietly():
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{directory}", load_weights=False)
        for module in model.modules():  # statistics that differ from those of a batch, so that mixing them up shows
            if isinstance(module, torch.nn.BatchNorm2d) and module.running_mean is not None:
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    save_local_dir(model, config, directory)
    return directory
