"""What a GPU does with each station, for `mini` and a ViT-B/32 with random weights: speed and agreement, not accuracy.

Figures, each under the model's name: train.images_per_second; export.seconds; engine.ENGINE.images_per_second (batches
of 256, in process) and engine.ENGINE.from_cpu (largest difference of a feature from the CPU's); serve.start_seconds,
serve.requests_per_second (16 at once, JPEG, 10 labels), serve.lone_request_ms; probe.seconds (20 steps).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pmgaft_export.bundle import Bundle, open_bundle
from pmgaft_serve.client import Client, Question
from pmgaft_serve.engines import open_engine
from pmgaft_serve.torchserve import ServeOptions, serving

RESULTS = Path(__file__).parent / "results" / "gpu.json"
TRAIN_BATCH = {"mini": 64, "vit_b32": 128}
TRAIN_STEPS = 30
ENGINES = ("torchscript", "onnxruntime")
ENGINE_BATCH = 256
LABELS = ("cat", "dog", "toaster", "red bicycle", "bowl of fruit", "train", "tree", "house", "book", "face")
CLIENTS = 16
REQUESTS = 1000

Figures = dict[str, float]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    arguments.add_argument("--output", type=Path, default=RESULTS)
    output = arguments.parse_args().output
    if not torch.cuda.is_available():
        sys.exit("gpu.py: error: torch sees no CUDA device here; this benchmark needs a GPU")
    with tempfile.TemporaryDirectory(prefix="pmgaft-gpu-") as scratch:
        figures = measure_all(Path(scratch), {"mini": "mini", "vit_b32": random_vit(Path(scratch))}, "cuda")
    machine = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "python": sys.version.split()[0]}
    versions = {name: version(name) for name in ("torch", "open_clip_torch", "onnxruntime-gpu", "torchserve")}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"figures": figures, "machine": machine, "versions": versions}, indent=2) + "\n")
    print(f"wrote {output}")


def measure_all(scratch: Path, models: dict[str, str], device: str) -> Figures:
    """Every station for every model (its short name -> what `load_clip` takes)."""
    images = write_images(scratch / "images", classes=10, each=64)
    figures: Figures = {}
    for name, model in models.items():
        found = measure(model, images, scratch / name, TRAIN_BATCH[name], device)
        figures |= {f"{name}.{key}": value for key, value in found.items()}
        for key, value in found.items():
            print(f"{name + '.' + key:<60} {value:.6g}", flush=True)
    return figures


def measure(model: str, images: Path, scratch: Path, batch: int, device: str) -> Figures:
    """Every station for one model."""
    scratch.mkdir()
    figures = {"train.images_per_second": train(model, images, scratch / "run", batch, device)}
    begun = time.perf_counter()
    pmgaft("export", scratch / "run", "--output-dir", scratch / "bundle")
    figures["export.seconds"] = time.perf_counter() - begun
    bundle = open_bundle(scratch / "bundle")
    for engine in ENGINES:
        figures |= ceiling(bundle, engine, device)
    return figures | serve(bundle, next(images.rglob("*.jpg")), device)


def random_vit(scratch: Path) -> str:
    """ViT-B-32-quickgelu with random weights, in open_clip's local-dir form."""
    import open_clip

    from pmgaft.clip.loading import save_local_dir

    name = "ViT-B-32-quickgelu"
    torch.manual_seed(0)
    model = open_clip.create_model(name, pretrained=None)
    preprocess = open_clip.get_model_preprocess_cfg(model)
    kept = {key: preprocess[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": kept}
    save_local_dir(model, config, scratch / "random")
    return f"local-dir:{scratch / 'random'}"


def write_images(folder: Path, classes: int, each: int) -> Path:
    """An image folder of JPEGs, 500 x 375, noise on smooth shapes."""
    generator = np.random.default_rng(0)
    for index in range(classes * each):
        path = folder / "train" / f"class {index % classes}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        shapes = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((500, 375))
        noise = generator.integers(-20, 21, (375, 500, 3))
        Image.fromarray((np.asarray(shapes) + noise).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return folder


def pmgaft(*words: object) -> None:
    """Run a command as a user would; its own message ends the benchmark if it fails."""
    subprocess.run([sys.executable, "-m", "pmgaft", *map(str, words)], check=True)


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes, what it left running on the GPU included."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def train(model: str, images: Path, run: Path, batch: int, device: str) -> float:
    """Images a second of PMG-AFT, two attack steps, without the first third of the run: that warms up."""
    settings = {
        "model": model,
        "steps": TRAIN_STEPS,
        "batch": batch,
        "micro_batch": batch,
        "workers": 8,
        "log_every": 1,
    }
    chosen = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    recipe = run.with_suffix(".toml")
    recipe.write_text(f'model = "mini"\ndata = {json.dumps(str(images))}\n')
    pmgaft("train", recipe, *chosen, "--device", device, "--output-dir", run)
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    times: list[float] = [event["time"] for event in events if event["event"] == "step"][TRAIN_STEPS // 3 :]
    return batch * (len(times) - 1) / (times[-1] - times[0])


def ceiling(bundle: Bundle, engine: str, device: str) -> Figures:
    """An engine's images a second, and how far its features are from the same engine's on the CPU."""
    pixels = torch.rand(ENGINE_BATCH, 3, *bundle.preprocess.size, generator=torch.Generator().manual_seed(0))
    here = open_engine(bundle, engine, torch.device("cpu"), threads=8)
    there = open_engine(bundle, engine, torch.device(device), threads=8)
    difference = float((there.image(pixels[:8]) - here.image(pixels[:8])).abs().max())
    for _ in range(3):
        there.image(pixels)
    rounds = [seconds(lambda: there.image(pixels)) for _ in range(10)]
    return {
        f"engine.{there.name}.images_per_second": ENGINE_BATCH / statistics.median(rounds),
        f"engine.{there.name}.from_cpu": difference,
    }


def serve(bundle: Bundle, picture: Path, device: str) -> Figures:
    """The server's start, its throughput, a lone request, and a probe."""
    begun = time.perf_counter()
    with serving(ServeOptions(bundle=bundle.directory, port=0, device=device)) as server, Client(server.url) as client:
        started = time.perf_counter() - begun
        image = picture.read_bytes()
        question = Question(labels=LABELS)
        probing = Question(labels=LABELS, probe={"eps": "1/255", "steps": 20})
        for _ in range(20):
            client.classify(image, question)
        lone = [seconds(lambda: client.classify(image, question)) for _ in range(50)]
        with ThreadPoolExecutor(CLIENTS) as pool:
            together = seconds(lambda: list(pool.map(lambda _: client.classify(image, question), range(REQUESTS))))
        client.classify(image, probing)
        probes = [seconds(lambda: client.classify(image, probing)) for _ in range(5)]
    return {
        "serve.start_seconds": started,
        "serve.requests_per_second": REQUESTS / together,
        "serve.lone_request_ms": 1000 * statistics.median(lone),
        "probe.seconds": statistics.median(probes),
    }


if __name__ == "__main__":
    main()
