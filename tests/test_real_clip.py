"""The way a user of a real CLIP goes: a published robust checkpoint, trained on, exported, opened, answering.

The model is a ViT with random weights, the file has the form of the TeCoA and PMG-AFT releases.
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from pmgaft.cli import main
from pmgaft.clip.loading import Clip, load_clip
from pmgaft.clip.preprocess import to_pixels
from pmgaft.clip.text import TextEncoder, label_features
from pmgaft_export.bundle import Bundle, open_bundle
from pmgaft_export.runtime import open_encoder
from pmgaft_serve.client import Client, Question
from pmgaft_serve.torchserve import ServeOptions, serving

LABELS = ["red disc", "green square", "blue stripes", "toaster"]


@pytest.fixture(scope="module")
def published(tiny_vit_clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model_best.pth.tar: another image tower for the tiny ViT, an empty prompter, a NumPy scalar, an optimiser."""
    generator = torch.Generator().manual_seed(3)
    tower = {
        name: value + 0.02 * torch.randn(value.shape, generator=generator)
        for name, value in tiny_vit_clip.image.tower.state_dict().items()
    }
    path = tmp_path_factory.mktemp("published") / "model_best.pth.tar"
    torch.save(
        {
            "epoch": 10,
            "state_dict": {},
            "add_prompter": torch.zeros(1, 0, 768),
            "vision_encoder_state_dict": tower,
            "best_acc1": np.float64(41.25),
            "optimizer": {"state": {}, "param_groups": [{"lr": 5e-5, "params": [0]}]},
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def run(published: Path, tiny_vit_clip_dir: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step of `pmgaft train` from the published file."""
    where = tmp_path_factory.mktemp("runs") / "real"
    settings = {
        "model": f"local-dir:{tiny_vit_clip_dir}",
        "pretrained": str(published),
        "batch": 8,
        "epochs": 0.17,
        "lr": 1e-3,
        "warmup": 0.0,
        "workers": 0,
        "hold_out": 0.0,
    }
    chosen = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    done = pmgaft("train", "vit-b32-tinyimagenet", *chosen, "--data", shards, "--output-dir", where, "--device", "cpu")
    assert done.exit_code == 0, done.output
    return where


@pytest.fixture(scope="module")
def bundle(run: Path) -> Bundle:
    done = pmgaft("export", run, "--output-dir", run.parent / "bundle")
    assert done.exit_code == 0, done.output
    return open_bundle(run.parent / "bundle")


def pmgaft(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_published_tower_is_what_is_loaded(published: Path, tiny_vit_clip_dir: Path, tiny_vit_clip: Clip) -> None:
    robust = load_clip(f"local-dir:{tiny_vit_clip_dir}", str(published))
    expected = torch.load(published, weights_only=False)["vision_encoder_state_dict"]
    loaded = robust.image.tower.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    pixels = torch.rand(2, 3, *robust.image.size)
    assert not torch.allclose(robust.image(pixels), tiny_vit_clip.image(pixels), atol=1e-3)


def test_one_step_of_training_starts_from_the_published_tower(
    run: Path, published: Path, tiny_vit_clip_dir: Path
) -> None:
    *_, end = (json.loads(line) for line in (run / "log.jsonl").read_text().splitlines())
    assert (end["event"], end["step"]) == ("end", 1)
    start = load_clip(f"local-dir:{tiny_vit_clip_dir}", str(published)).open_clip_model
    trained = load_clip(str(run)).open_clip_model
    moved = {name for name, value in trained.state_dict().items() if not torch.equal(value, start.state_dict()[name])}
    assert moved
    assert all(name.startswith("visual.") for name in moved)
    for name in moved:
        assert (trained.state_dict()[name] - start.state_dict()[name]).abs().max() < 0.01


def test_the_exported_model_ranks_labels_as_the_trained_one(
    run: Path, bundle: Bundle, tiny_images: list[Image.Image]
) -> None:
    trained = load_clip(str(run))
    pixels = torch.stack([to_pixels(image, bundle.preprocess) for image in tiny_images])
    assert torch.equal(pixels, torch.stack([to_pixels(image, trained.preprocess) for image in tiny_images]))
    expected = trained.logits(pixels, label_features(trained.text.encode, LABELS)).softmax(dim=1)
    for name in ("torchscript", "onnx"):
        entry = bundle.manifest.formats[name]
        tower = open_encoder(bundle.path(entry.text)).run
        text = TextEncoder(bundle.tokenizer(), tower, bundle.manifest.text.causal)
        features = open_encoder(bundle.path(entry.image)).run(pixels)
        found = (bundle.manifest.logit_scale * features @ label_features(text.encode, LABELS).T).softmax(dim=1)
        assert torch.allclose(found, expected, atol=1e-4)


def test_the_bundle_tells_which_run_and_recipe_it_came_from(run: Path, bundle: Bundle, published: Path) -> None:
    source = bundle.manifest.source
    assert source.run == run.name
    assert source.recipe is not None
    assert source.recipe["pretrained"] == str(published)
    assert source.recipe["attack"]["eps"] == "1/255"


@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("serve")
def test_the_served_bundle_answers_over_http_as_the_trained_model(
    run: Path, bundle: Bundle, tiny_images: list[Image.Image]
) -> None:
    trained, picture = load_clip(str(run)), io.BytesIO()
    tiny_images[0].save(picture, "PNG")
    logits = trained.logits(
        to_pixels(tiny_images[0], trained.preprocess)[None], label_features(trained.text.encode, LABELS)
    )
    expected = dict(zip(LABELS, logits.softmax(dim=1)[0].tolist(), strict=True))
    with serving(ServeOptions(bundle=bundle.directory, port=0, device="cpu")) as server, Client(server.url) as client:
        answer = client.classify(picture.getvalue(), Question(labels=LABELS, probe={"eps": "1/255", "steps": 2}))
    assert {p.label: p.probability for p in answer.predictions} == pytest.approx(expected, abs=1e-3)
    assert answer.probe is not None
    assert answer.probe.threat_model.eps == "1/255"
