"""Writes the shipped files in half precision: the text tower once, and an image tower."""

from __future__ import annotations

import json
import math
from pathlib import Path

import click
import open_clip
import safetensors.torch
import torch
from image_tower import SCALE, as_encoder, imagenet_classifier
from open_clip.model import CLIP
from torch import Tensor, nn

from pmgaft.clip.image import fold_batchnorm
from pmgaft.training.folding import unfold_batchnorm

PREPROCESS = {"size": 128, "mode": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
RESULTS = Path(__file__).parent.parent / "results"


@torch.no_grad()
def assemble(work_dir: Path) -> nn.Module:
    """mini: both towers in one open_clip model."""
    model = CLIP(**json.loads((work_dir / "config.json").read_text())).eval()
    model.load_state_dict(torch.load(work_dir / "text_tower.pt", weights_only=True), strict=False)
    model.logit_scale.fill_(math.log(SCALE))
    trained = torch.load(work_dir / "image_tower.pt", weights_only=True)
    original = imagenet_classifier().state_dict()
    model.visual.trunk.load_state_dict({name: original[name] for name in model.visual.trunk.state_dict()})
    model.visual.head.mlp.load_state_dict(trained["head"])
    whole = as_encoder(model.visual)
    folded = fold_batchnorm(whole)
    folded.tower.trunk.load_state_dict({name: trained["trunk"][name] for name in folded.tower.trunk.state_dict()})
    model.visual = unfold_batchnorm(folded, whole).tower
    pixels = torch.rand(2, 3, *whole.size)
    torch.testing.assert_close(as_encoder(model.visual)(pixels), folded(pixels), rtol=1e-3, atol=1e-3)
    return model


def halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (v.half() if v.is_floating_point() else v).contiguous() for name, v in state.items()}


def keep_log(run: Path) -> None:
    """What the run measured on its held-out images, and how long it took: results/train-RUN.json."""
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    kept = [
        {name: value for name, value in event.items() if name != "time"}
        for event in events
        if event["event"] in ("judged", "end")
    ]
    (RESULTS / f"train-{run.name}.json").write_text(json.dumps(kept, indent=2) + "\n")


@click.command()
@click.option("--work-dir", type=click.Path(path_type=Path), help="Of the other steps: writes mini and the text tower.")
@click.option("--run", type=click.Path(path_type=Path), help="A run of `pmgaft train`: writes mini-robust.")
@click.option("--output-dir", required=True, type=click.Path(path_type=Path))
def main(work_dir: Path | None, run: Path | None, output_dir: Path) -> None:
    if work_dir is not None:
        state = assemble(work_dir).state_dict()
        visual = {name: value for name, value in state.items() if name.startswith("visual.")}
        rest = {name: value for name, value in state.items() if name not in visual}
        safetensors.torch.save_file(halved(visual), output_dir / "mini.safetensors")
        safetensors.torch.save_file(halved(rest), output_dir / "text.safetensors")
        config = {"model_cfg": json.loads((work_dir / "config.json").read_text()), "preprocess_cfg": PREPROCESS}
        (output_dir / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
        (RESULTS / "make_mini.json").write_text((work_dir / "figures.json").read_text())
    if run is not None:
        model = open_clip.create_model(f"local-dir:{run / 'model'}")
        visual = {name: v for name, v in model.state_dict().items() if name.startswith("visual.")}
        safetensors.torch.save_file(halved(visual), output_dir / "mini-robust.safetensors")
        keep_log(run)


if __name__ == "__main__":
    main()
