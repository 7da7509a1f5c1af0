"""What onnx-int8 costs the shipped models in clean accuracy, set by set.

python benchmarks/int8_accuracy.py --data-root DATA   (writes results/int8_accuracy.json; some minutes)

Each model is quantised twice, with scales from the built-in photographs and from tiny_imagenet's training pictures, and
answers up to --images pictures of each set, the same ones as the float32 graph, which answers as the original does.
serve.best_engine_clean_drop_points of results/summary.json is mini.built-in.cost_points.
Figures, each under MODEL.CALIBRATION.SET: accuracy (percent, float32), cost_points and its standard error,
top1_agreement, cosine (lowest) and cosine_mean. MODEL.CALIBRATION.cost_points is the mean over the zero-shot sets.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

import click
import torch
from record import RESULTS, summarise

from pmgaft.clip.loading import load_clip
from pmgaft_export.build import Evidence, prepare
from pmgaft_export.formats import write_onnx
from pmgaft_export.int8 import quantise
from pmgaft_export.parity import measure, reference
from pmgaft_export.runtime import CPU, machine, open_encoder
from pmgaft_export.sample import comparison_sample, photographs

OUTPUT = RESULTS / "int8_accuracy.json"
MODELS = ("mini", "mini-robust")
ZERO_SHOT = ("cifar10", "caltech101", "grocery", "flowers5", "dtd10")
SETS = {name: f"zeroshot/{name}" for name in ZERO_SHOT} | {"tiny_imagenet": "tiny_imagenet"}

Figures = dict[str, float]


def measure_model(name: str, data_root: Path, images: int, scratch: Path) -> Figures:
    """All figures of one model, by CALIBRATION.SET.FIGURE."""
    clip = load_clip(name)
    float32 = scratch / "float32.onnx"
    write_onnx(prepare(clip, Evidence(parity_images=8)).image, float32)
    calibrations = {"built-in": None, "tiny_imagenet": str(data_root / "tiny_imagenet")}
    for calibration, data in calibrations.items():
        quantise(float32, scratch / f"{calibration}.onnx", lambda data=data: photographs(clip.preprocess, data))  # type: ignore[misc]
    figures: Figures = {}
    for images_of, where in SETS.items():
        sample = comparison_sample(clip.preprocess, str(data_root / where), images)
        original = reference(open_encoder(float32).run, clip.text_tower, clip.tokenizer, clip.image.size, sample)
        for calibration in calibrations:
            int8 = open_encoder(scratch / f"{calibration}.onnx", precision="int8").run
            found = measure(original, int8, clip.text_tower)
            assert found.accuracy is not None
            figures |= {
                f"{calibration}.{images_of}.{figure}": value
                for figure, value in {
                    "accuracy": 100 * found.accuracy,
                    "cost_points": found.cost_points,
                    "cost_error_points": found.cost_error_points,
                    "top1_agreement": found.top1_agreement,
                    "cosine": found.cosine,
                    "cosine_mean": found.cosine_mean,
                }.items()
            }
            cost = f"{found.cost_points:.2f} ± {found.cost_error_points:.2f}"
            print(f"{name} {calibration} {images_of}: {cost} of {100 * found.accuracy:.1f} points", flush=True)
    for calibration in calibrations:
        costs = [figures[f"{calibration}.{images_of}.cost_points"] for images_of in ZERO_SHOT]
        figures[f"{calibration}.cost_points"] = statistics.mean(costs)
    return figures


@click.command()
@click.option("--data-root", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--images", default=1000, show_default=True, type=click.IntRange(10), help="Of each set, at most.")
@click.option("--output", default=OUTPUT, show_default=True, type=click.Path(path_type=Path))
def main(data_root: Path, images: int, output: Path) -> None:
    """Measure, print, write JSON."""
    figures: Figures = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory(prefix="pmgaft-int8-") as scratch:
            found = measure_model(name, data_root, images, Path(scratch))
        figures |= {f"{name}.{key}": round(value, 5) for key, value in found.items()}
    content = {"figures": figures, "images": images, "machine": machine(CPU), "torch": torch.__version__}
    output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {output}")
    if output == OUTPUT:
        summarise({"serve.best_engine_clean_drop_points": figures["mini.built-in.cost_points"]})


if __name__ == "__main__":
    main()
