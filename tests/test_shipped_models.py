"""The weights that the package ships, and the package that ships them."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pmgaft.clip.loading import Clip, load_clip
from pmgaft.clip.preprocess import open_image, to_pixels
from pmgaft.clip.text import label_features
from pmgaft.clip.zoo import HERE, NAMES

REPOSITORY = Path(__file__).parent.parent
LABELS = ("cat", "dog", "toaster", "teapot", "sofa", "car")


@pytest.fixture(scope="module", params=NAMES)
def shipped(request: pytest.FixtureRequest) -> Clip:
    return load_clip(request.param)


def best(clip: Clip, picture: Path, labels: list[str], template: str) -> int:
    pixels = to_pixels(open_image(picture), clip.preprocess)[None]
    texts = label_features(clip.text.encode, labels, [template])
    with torch.no_grad():
        return int(clip.logits(pixels, texts).argmax())


def test_a_cat_is_called_a_cat(shipped: Clip) -> None:
    skimage = pytest.importorskip("skimage")
    cat = Path(skimage.__file__).parent / "data" / "chelsea.png"
    assert LABELS[best(shipped, cat, list(LABELS), "a photo of a {}.")] == "cat"


def test_at_least_eleven_of_fifteen_photographs_get_their_own_caption(photos: Path) -> None:
    clip = load_clip("mini")
    pictures = json.loads((photos / "photos.json").read_text())
    captions = [picture["caption"] for picture in pictures]
    answers = [best(clip, photos / picture["file"], captions, "{}") for picture in pictures]
    right = sum(answer == place for place, answer in enumerate(answers))
    assert right >= 11


def test_a_label_in_another_neutral_template_stays_near_itself(shipped: Clip) -> None:
    plain, templated = (label_features(shipped.text.encode, LABELS, [t]) for t in ("{}", "a photo of a {}."))
    assert (plain @ templated.T).argmax(dim=1).tolist() == list(range(len(LABELS)))
    assert (plain * templated).sum(-1).min() > 0.8


def test_batchnorm_statistics_of_the_robust_model_are_the_originals() -> None:
    mini, robust = (safetensors.torch.load_file(HERE / f"{name}.safetensors") for name in NAMES)
    assert mini.keys() == robust.keys()
    statistics = [name for name in mini if "running_" in name]
    assert statistics
    assert all(torch.equal(mini[name], robust[name]) for name in statistics)


def test_both_models_fit_in_32_megabytes() -> None:
    assert sum(file.stat().st_size for file in HERE.glob("*.safetensors")) <= 32e6


def test_the_wheel_carries_weights_recipes_and_word_lists_and_no_tests(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in (REPOSITORY / "pmgaft", REPOSITORY / "export/pmgaft_export", REPOSITORY / "serve/pmgaft_serve"):
        for file in package.rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert f"{package.name}/{file.relative_to(package).as_posix()}" in names
    assert not [name for name in names if name.startswith(("tests/", "export/", "serve/", "benchmarks/"))]
