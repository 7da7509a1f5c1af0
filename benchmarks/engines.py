"""The ceiling of serving: images a second of every format's image encoder, in process.

python benchmarks/engines.py                 `mini` and a ViT-B/32 with random weights, on the CPU, batches 1, 8, 32
python benchmarks/engines.py --device cuda   ViT-B/32 and ViT-L/14 with random weights on a GPU, batches to 128; under a
                                             minute; --compiled adds AOTInductor, which compiles for minutes
python benchmarks/engines.py --quick         `mini` alone and for a moment: whether everything runs, no figures to keep

Formats take turns inside every round, so that all feel the same noise. images_per_second is of the best round;
over_eager is the median over rounds of eager's time over the format's in the same round. eager is the tower as it is
loaded, with BatchNorm apart, in float32. cosine is the lowest of a feature with eager's over 32 crops of photographs
(shapes where scikit-image is missing): with random weights it is a check, not a statement about accuracy.
On a GPU "host" starts and ends in the CPU's memory, as serving does; without it, pixels lie on the GPU already.

Writes results/engines-DEVICE.json: figures by the names MODEL.FORMAT[.host].bBATCH.{images_per_second, over_eager},
MODEL.FORMAT.cosine, and ceiling.MODEL (the best float32 format at its best batch) and ceiling.MODEL_int8 or _fp16.
"""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click
import open_clip
import torch
from record import RESULTS, cores
from torch import Tensor

from pmgaft.clip.image import PixelEncoder, fold_batchnorm, freeze
from pmgaft.clip.loading import load_clip, quietly
from pmgaft.clip.preprocess import PreprocessSpec
from pmgaft.device import pick_device
from pmgaft.errors import PmgaftError
from pmgaft.evaluation.run import nothing_in_place
from pmgaft_export.formats import FORMATS, Encoder, Tools
from pmgaft_export.runtime import Encode, machine, open_encoder
from pmgaft_export.sample import comparison_sample, photographs, sample_pixels

MODELS = {"cpu": ("mini", "vit_b32"), "cuda": ("vit_b32", "vit_l14")}
NAMES = {"vit_b32": "ViT-B-32-quickgelu", "vit_l14": "ViT-L-14-quickgelu"}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
WRITTEN = {
    "cpu": ("torchscript", "onnx", "onnx-int8", "pt2"),
    "cuda": ("torchscript", "torchscript-fp16", "onnx-fp16"),
}
COMPILED = "pt2-fp16"
BATCHES = {"cpu": (1, 8, 32), "cuda": (1, 8, 32, 128)}
LOWER = {"onnx-int8": "int8", "torchscript-fp16": "fp16", "onnx-fp16": "fp16", "pt2-fp16": "fp16"}
EAGER = "eager"

Figures = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """rounds: of all formats in turn. seconds: of one format in one round, at least. batches: sizes tried."""

    rounds: int
    seconds: float
    batches: tuple[int, ...]


def eager_encoder(name: str, device: torch.device) -> tuple[PixelEncoder, PreprocessSpec]:
    """`mini`, or an image tower with random weights, frozen, on the device."""
    if name in NAMES:
        torch.manual_seed(0)
        with quietly(), device:
            tower = open_clip.create_model(NAMES[name], load_weights=False, device=device).visual
        spec = PreprocessSpec(size=(224, 224), mean=MEAN, std=STD, interpolation="bicubic", resize_mode="shortest")
    else:
        clip = load_clip(name)
        tower, spec = clip.image.tower, clip.preprocess
    return freeze(PixelEncoder(tower, spec.mean, spec.std, spec.size)).to(device), spec


def opened(
    name: str, formats: tuple[str, ...], device: torch.device, threads: int, scratch: Path
) -> tuple[dict[str, Encode], PreprocessSpec]:
    """Eager, and every format that can be written and opened here; others are named on stderr with the reason."""
    eager, spec = eager_encoder(name, device)

    def run_eager(values: Tensor) -> Tensor:
        with torch.no_grad():
            return eager(values.to(device)).cpu()  # type: ignore[no-any-return]

    encoders: dict[str, Encode] = {EAGER: run_eager}
    pixels = sample_pixels(2, spec.size, seed=0).to(device)
    encoder = Encoder(module=nothing_in_place(freeze(fold_batchnorm(eager))), example=pixels, dynamic={0: "batch"})
    graph = scratch / "onnx" / "image.onnx"
    for form in formats:
        started = time.perf_counter()
        path = scratch / form / f"image{FORMATS[form].suffix}"
        path.parent.mkdir(parents=True)
        tools = Tools(
            device=device, photographs=lambda: photographs(spec, None), graph=graph if graph.exists() else None
        )
        try:
            FORMATS[form].write(encoder, path, tools)
            found = open_encoder(path, device, threads, precision=FORMATS[form].precision)
            if found.engine.endswith("-cpu") and device.type != "cpu":
                raise PmgaftError(f"{found.engine} has nothing for this GPU")
        except Exception as error:
            say(f"  {form} is left out: {error}")
            continue
        encoders[form] = found.run
        say(f"  {form} written and opened in {time.perf_counter() - started:.1f} s")
    return encoders, spec


def measure(encoders: Mapping[str, Encode], pixels: Tensor, effort: Effort) -> Figures:
    """FORMAT.images_per_second and FORMAT.over_eager for one batch, where it lies."""
    times: dict[str, list[float]] = {form: [] for form in encoders}
    for encode in encoders.values():
        for _ in range(3):
            encode(pixels)
    for _ in range(effort.rounds):
        for form, encode in encoders.items():
            times[form].append(seconds_a_call(encode, pixels, effort.seconds))
    figures: Figures = {}
    for form, taken in times.items():
        figures[f"{form}.images_per_second"] = len(pixels) / min(taken)
        ratios = [eager / own for eager, own in zip(times[EAGER], taken, strict=True)]
        figures[f"{form}.over_eager"] = statistics.median(ratios)
    return figures


def seconds_a_call(encode: Encode, pixels: Tensor, least: float) -> float:
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < least:
        encode(pixels)
        calls += 1
    return (time.perf_counter() - start) / calls


def measure_model(name: str, formats: tuple[str, ...], device: torch.device, threads: int, effort: Effort) -> Figures:
    """All figures of one model, without its name."""
    with tempfile.TemporaryDirectory(prefix="pmgaft-engines-") as scratch:
        encoders, spec = opened(name, formats, device, threads, Path(scratch))
        sample = comparison_sample(spec, None, 32).pixels
        features = {form: encode(sample) for form, encode in encoders.items()}
        figures: Figures = {
            f"{form}.cosine": float((found * features[EAGER]).sum(dim=1).min())
            for form, found in features.items()
            if form != EAGER
        }
        for batch in effort.batches:
            pixels = sample_pixels(batch, spec.size, seed=0)
            places = {"": pixels} if device.type == "cpu" else {"": pixels.to(device), ".host": pixels}
            for place, values in places.items():
                for key, value in measure(encoders, values, effort).items():
                    form, figure = key.rsplit(".", 1)
                    figures[f"{form}{place}.b{batch}.{figure}"] = value
        return figures


def ceilings(name: str, figures: Figures) -> Figures:
    """The best rate of float32 formats, and of each lower precision, at the best batch."""
    best: Figures = {}
    for key, value in figures.items():
        form, _, figure = key.partition(".")
        if figure.endswith(".images_per_second") and "host" not in figure and form != EAGER:
            place = f"ceiling.{name}" + (f"_{LOWER[form]}" if form in LOWER else "")
            best[place] = max(best.get(place, 0.0), value)
    return best


def table(name: str, figures: Figures, batches: tuple[int, ...]) -> str:
    """Markdown: a row a format, images a second and the ratio to eager for each batch."""
    rows = sorted({key.rsplit(".", 2)[0] for key in figures if key.endswith(".images_per_second")})
    lines = [f"| {name} | " + " | ".join(f"batch {batch}" for batch in batches) + " | cosine |"]
    lines.append("|---" * (len(batches) + 2) + "|")
    for row in rows:
        cells = [
            f"{figures[f'{row}.b{batch}.images_per_second']:.1f}/s, {figures[f'{row}.b{batch}.over_eager']:.2f}x"
            for batch in batches
        ]
        cosine = figures.get(f"{row.removesuffix('.host')}.cosine")
        lines.append(f"| {row} | " + " | ".join(cells) + f" | {'' if cosine is None else f'{cosine:.5f}'} |")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "onnxruntime", "onnxruntime-gpu", "onnx", "onnxscript", "open_clip_torch", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@click.command()
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--model", "models", multiple=True, type=click.Choice(["mini", *NAMES]), help="[default: see above]")
@click.option("--threads", type=click.IntRange(1), help="Of one call, on a CPU [default: all cores]")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1))
@click.option("--compiled", is_flag=True, help="On a GPU: AOTInductor, too.")
@click.option("--quick", is_flag=True, help="Whether everything runs; nothing is kept.")
@click.option("--output", type=click.Path(path_type=Path), help="[default: results/engines-DEVICE.json]")
def main(
    device: str,
    models: tuple[str, ...],
    threads: int | None,
    rounds: int,
    compiled: bool,
    quick: bool,
    output: Path | None,
) -> None:
    """Measure, print tables, write JSON."""
    picked = pick_device(device)
    kind = picked.type
    threads = threads or cores()
    torch.set_num_threads(threads)
    formats = WRITTEN[kind] + ((COMPILED,) if compiled and kind == "cuda" else ())
    effort = Effort(rounds=rounds, seconds=0.5 if kind == "cpu" else 0.1, batches=BATCHES[kind])
    if quick:
        effort = replace(effort, rounds=1, seconds=0.0, batches=(1, 8))
        formats = tuple(form for form in formats if not FORMATS[form].compiled)
    elif kind == "cpu" and shutil.which("g++") is None:
        formats = tuple(form for form in formats if not FORMATS[form].compiled)
    figures: Figures = {}
    for name in models or (MODELS[kind][:1] if quick else MODELS[kind]):
        say(name)
        found = measure_model(name, formats, picked, threads, effort)
        print(table(name, found, effort.batches) + "\n", flush=True)
        figures |= {f"{name}.{key}": value for key, value in found.items()} | ceilings(name, found)
    if quick:
        return
    place = output or RESULTS / f"engines-{kind}.json"
    content = {
        "figures": {key: round(value, 5) for key, value in figures.items()},
        "machine": {"name": machine(picked), "threads": threads, "cores": cores(), "python": platform.python_version()},
        "versions": versions(),
    }
    place.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    say(f"wrote {place}")


if __name__ == "__main__":
    main()
