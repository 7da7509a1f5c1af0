"""Train every objective from one start with equal budgets, and evaluate all of them under one protocol.

Stages. tune: each objective at several learning rates, a quarter of the budget, judged on held-out training images.
final: each at its chosen rate, three seeds. rate: the same at one learning rate for all. ablation: settings of PMG-AFT,
half the budget, one seed. shipped: nothing is trained; the package's mini-robust is judged. All but tune are judged:
clean on all images; on a fixed part of each set PGD-100 at 1/255, and the worst case of it with APGD on the cross
entropy and on the difference of logits ratio, 50 steps each, at 1/255, 2/255 and 4/255.

One JSON file a run, in --results; what is there already is not run again. benchmarks/objectives_table.py makes tables
of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from record import installed
from torch import Tensor

from pmgaft.attacks import Budget, apgd, cross_entropy_loss, dlr_loss, misclassified, pgd
from pmgaft.clip.loading import Clip, load_clip, save_local_dir, tensors_hash
from pmgaft.clip.text import label_features
from pmgaft.data import loader, open_dataset
from pmgaft.device import pick_device
from pmgaft.evaluation.run import attackable
from pmgaft.threat import ThreatModel
from pmgaft.training.loop import train
from pmgaft.training.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "objectives"

OBJECTIVES: dict[str, dict[str, Any]] = {
    "finetune": {"name": "finetune"},
    "tecoa": {"name": "tecoa"},
    "fare": {"name": "fare"},
    "pmg_aft": {"name": "pmg-aft"},
    "release": {"name": "pmg-aft", "logit_scale": 1.0, "reduction": "sum"},
    "caw": {"name": "caw"},
    "agft": {"name": "agft"},
    "ucat": {"name": "ucat", "strength": 100.0},
    "guide_names": {"name": "pmg-aft", "alpha": 0.0, "beta": 0.0, "gamma": 1.5, "guide_texts": "imagenet-names"},
    "soft": {"name": "pmg-aft", "logit_scale": 1.0},
    "tecoa_soft": {"name": "tecoa", "logit_scale": 1.0},
}
ABLATION: dict[str, dict[str, Any]] = {
    "student_first": {"name": "pmg-aft", "kl_direction": "student-first"},
    "detached": {"name": "pmg-aft", "detach_clean": True},
    "light": {"name": "pmg-aft", "alpha": 0.3, "beta": 0.3},
    "no_guide": {"name": "pmg-aft", "alpha": 0.0},
    "no_clean_branch": {"name": "pmg-aft", "beta": 0.0},
    "scaled_but_summed": {"name": "pmg-aft", "reduction": "sum"},
    "scale_3": {"name": "pmg-aft", "logit_scale": 3.0},
    "scale_10": {"name": "pmg-aft", "logit_scale": 10.0},
    "soft_feature": {"name": "pmg-aft", "logit_scale": 1.0, "feature": 1.0},
    "soft_guide_names": {
        "name": "pmg-aft",
        "logit_scale": 1.0,
        "alpha": 0.0,
        "beta": 0.0,
        "gamma": 30.0,
        "guide_texts": "imagenet-names",
    },
    "guide_on_clean": {"name": "pmg-aft", "alpha": 0.0, "beta": 0.0, "gamma": 1.0},
    "guide_on_clean_names": {
        "name": "pmg-aft",
        "alpha": 0.0,
        "beta": 0.0,
        "gamma": 0.7,
        "guide_texts": "imagenet-names",
    },
    "guide_on_clean_names_heavy": {
        "name": "pmg-aft",
        "alpha": 0.0,
        "beta": 0.0,
        "gamma": 4.0,
        "guide_texts": "imagenet-names",
    },
    "guide_on_clean_names_feature": {
        "name": "pmg-aft",
        "alpha": 0.0,
        "beta": 0.0,
        "gamma": 1.5,
        "feature": 3.0,
        "guide_texts": "imagenet-names",
    },
}
RATES: dict[str, tuple[float, ...]] = dict.fromkeys(OBJECTIVES, (0.0001, 0.0003, 0.001)) | {
    "finetune": (3e-5, 1e-4, 3e-4)
}
SEEDS = (0, 1, 2)
SETS = ("cifar10", "caltech101", "grocery", "flowers5", "dtd10")
TRAINING_SET = "tiny_imagenet"
ATTACKED = 100
"""Images of each set that are attacked, drawn once with a fixed seed."""
EPS = (1 / 255, 2 / 255, 4 / 255)
CLEAN_BATCH = 500
CPU_BATCH = 32
"""Images that a CPU attacks at once: with more, its caches are too small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training run, and whether the zero-shot sets are looked at afterwards (never to choose anything)."""

    stage: str
    name: str
    objective: dict[str, Any]
    lr: float
    seed: int
    images: int

    @property
    def file(self) -> str:
        """Where its result lies."""
        return f"{self.stage}-{self.name}-lr{self.lr:.0e}-seed{self.seed}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all jobs share."""

    data: str
    results: str
    model: str
    device: str
    batch: int
    image_size: int
    attack_steps: int
    workers: int
    changes: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Decoded sets: uint8 [N, 3, H, W] and labels of each, and the rows of each that are attacked."""

    pixels: dict[str, Tensor]
    labels: dict[str, Tensor]
    attacked: dict[str, Tensor]
    hashes: dict[str, str]


def main() -> None:
    arguments = parse()
    setting = Setting(
        data=str(arguments.data_root),
        results=str(arguments.results),
        model=arguments.model,
        device=arguments.device,
        batch=arguments.batch,
        image_size=arguments.image_size,
        attack_steps=2,
        workers=arguments.workers,
        changes=json.loads(arguments.changes),
    )
    arguments.results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pmgaft-compare-") as scratch:
        if arguments.input_size:
            setting = replace(setting, model=resized(setting.model, arguments.input_size, Path(scratch) / "model"))
        cache_file = Path(scratch) / "pictures.pt"
        begun = time.monotonic()
        decode(setting, cache_file, arguments.decoders)
        print(f"decoded the evaluation sets ({time.monotonic() - begun:.0f} s)", flush=True)
        os.environ["PMGAFT_COMPARE_PICTURES"], os.environ["PMGAFT_COMPARE_DATA"] = str(cache_file), setting.data
        with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
            jobs = []
            if "baseline" in arguments.stages:
                jobs.append(Job(stage="baseline", name="original", objective={}, lr=0, seed=0, images=0))
            if "shipped" in arguments.stages:
                jobs.append(Job(stage="shipped", name="mini-robust", objective={}, lr=0, seed=0, images=0))
            if "tune" in arguments.stages:
                jobs += tuning(arguments.names, arguments.images // 4)
            run_all(pool, setting, jobs)
            rates = chosen_rates(arguments.rates_from or arguments.results, arguments.names)
            jobs = []
            if "final" in arguments.stages:
                jobs += finals(arguments.names, rates, arguments.images, arguments.seeds)
            if "rate" in arguments.stages:
                one_rate = dict.fromkeys(arguments.names, arguments.rate)
                jobs += finals(arguments.names, one_rate, arguments.images, arguments.seeds, stage="rate")
            if "ablation" in arguments.stages:
                jobs += [
                    Job(
                        stage="ablation", name=n, objective=o, lr=rates["pmg_aft"], seed=0, images=arguments.images // 2
                    )
                    for n, o in ABLATION.items()
                ]
            run_all(pool, setting, jobs)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--stages", nargs="+", default=["baseline", "tune", "final", "ablation"])
    parser.add_argument("--names", nargs="+", default=list(OBJECTIVES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--images", type=int, required=True, help="Training images shown to each final run.")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--input-size", type=int, help="Evaluate, too, at this size: a smaller sibling of the model.")
    parser.add_argument("--rate", type=float, default=3e-4, help="Learning rate of the stage of that name.")
    parser.add_argument("--rates-from", type=Path, help="Results of another model whose learning rates are taken.")
    parser.add_argument("--image-size", type=int, default=96, help="Size trained at.")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at once.")
    parser.add_argument("--workers", type=int, default=0, help="Processes of each run that decode images.")
    parser.add_argument("--decoders", type=int, default=0)
    parser.add_argument("--changes", default="{}", help="More settings of every recipe, JSON.")
    return parser.parse_args()


def resized(model: str, size: int, where: Path) -> str:
    """The same weights for pictures of another size, as convolutional towers allow."""
    clip = load_clip(model)
    config = json.loads(json.dumps(clip.open_clip_config))
    config["model_cfg"]["vision_cfg"]["image_size"] = size
    save_local_dir(clip.open_clip_model, config, where, clip.tokenizer)
    return f"local-dir:{where}"


def tuning(names: list[str], images: int) -> list[Job]:
    return [
        Job(stage="tune", name=name, objective=OBJECTIVES[name], lr=lr, seed=0, images=images)
        for name in names
        for lr in RATES[name]
    ]


def finals(names: list[str], rates: dict[str, float], images: int, seeds: list[int], stage: str = "final") -> list[Job]:
    return [
        Job(stage=stage, name=name, objective=OBJECTIVES[name], lr=rates[name], seed=seed, images=images)
        for seed in seeds
        for name in names
    ]


def chosen_rates(results: Path, names: list[str]) -> dict[str, float]:
    """Per objective the rate with the best harmonic mean of clean and robust accuracy on held-out training images; of
    clean fine-tuning, which no rate makes robust, the most accurate.
    """
    found: dict[str, float] = {}
    for name in {*names, "pmg_aft"}:
        runs = [json.loads(path.read_text()) for path in sorted(results.glob(f"tune-{name}-lr*.json"))]
        runs = [run for run in runs if run["job"]["name"] == name]
        if runs:
            key = "clean" if name == "finetune" else "harmonic"
            found[name] = max(runs, key=lambda run: run["held_out"][key])["job"]["lr"]
    return found


def run_all(pool: ProcessPoolExecutor, setting: Setting, jobs: list[Job]) -> None:
    waiting = [job for job in jobs if not (Path(setting.results) / job.file).exists()]
    futures = {pool.submit(carry_out, job, setting): job for job in waiting}
    for future in as_completed(futures):
        try:
            print(future.result(), flush=True)
        except Exception as error:  # one run's failure must not cost the others
            print(f"FAILED {futures[future].file}: {error!r}", flush=True)


def decode(setting: Setting, where: Path, workers: int) -> None:
    """All evaluation sets at the model's input size, once."""
    spec = load_clip(setting.model).preprocess
    pixels, labels, attacked, hashes = {}, {}, {}, {}
    for name in (*SETS, TRAINING_SET):
        dataset = open_dataset(str(folder(Path(setting.data), name)), "test")
        batches, rows = loader(dataset, spec, batch_size=100, workers=workers), []
        for _ in range(-(-len(dataset) // 100)):
            batch = next(batches)
            rows.append((batch.images, batch.labels))
        batches.close()
        pixels[name] = torch.cat([part for part, _ in rows])[: len(dataset)]
        labels[name] = torch.cat([part for _, part in rows])[: len(dataset)]
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
        attacked[name] = order[:ATTACKED].sort().values
        hashes[name] = dataset.hash
    torch.save({"pixels": pixels, "labels": labels, "attacked": attacked, "hashes": hashes}, where)


def folder(data: Path, name: str) -> Path:
    return data / name if name == TRAINING_SET else data / "zeroshot" / name


@cache
def pictures() -> Pictures:
    return Pictures(**torch.load(os.environ["PMGAFT_COMPARE_PICTURES"], mmap=True))


def carry_out(job: Job, setting: Setting) -> str:
    """One run from recipe to result file; a line to print."""
    torch.set_num_threads(1 if setting.device.startswith("cuda") else torch.get_num_threads())
    begun = time.monotonic()
    device = pick_device(setting.device)
    scratch = Path(tempfile.mkdtemp(prefix="pmgaft-run-"))
    result: dict[str, Any] = {"job": asdict(job)}
    model = job.name if job.stage == "shipped" else setting.model
    if job.stage not in ("baseline", "shipped"):
        recipe = recipe_of(job, setting)
        names = {"model": Path(setting.model).name, "data": f"DATA/{TRAINING_SET}"}  # and not where they lay
        result["recipe"] = recipe.model_dump(mode="json", exclude_none=True) | names
        model = f"local-dir:{train(recipe, scratch / 'run', device=device, resume=False, report=lambda *_: None)}"
        result |= told(scratch / "run" / "log.jsonl")
        result["start"] |= dict.fromkeys(("model", "guide"), names["model"])
    trained = time.monotonic()
    if job.stage != "tune":
        result["sets"] = evaluate(load_clip(model, device=device), device)
    result["seconds"] = {"train": trained - begun, "evaluate": time.monotonic() - trained}
    result["machine"] = {
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "pmgaft": version("pmgaft") if installed("pmgaft") else "source tree",
    }
    shutil.rmtree(scratch)
    (Path(setting.results) / job.file).write_text(json.dumps(result, indent=1) + "\n")
    figures = result["sets"]["average"] if "sets" in result else result["held_out"]
    shown = ", ".join(f"{key} {value:.1f}" for key, value in figures.items())
    return f"{job.file.removesuffix('.json'):44} {shown}  ({trained - begun:.0f} + {time.monotonic() - trained:.0f} s)"


def recipe_of(job: Job, setting: Setting) -> Recipe:
    values = {
        "model": setting.model,
        "data": str(folder(Path(setting.data), TRAINING_SET)),
        "seed": job.seed,
        "images": job.images,
        "batch": setting.batch,
        "micro_batch": setting.batch,
        "lr": job.lr,
        "warmup": 0.05,
        "image_size": setting.image_size,
        "augment": "crop-flip",
        "workers": setting.workers,
        "hold_out": 0.02,
        "log_every": 20,
        "checkpoint_every": 10**6,
        "attack": {"eps": "1/255", "steps": setting.attack_steps, "step_size": "1/255", "ramp": 0.3},
        "objective": job.objective,
    }
    return Recipe.model_validate(values | setting.changes)


def told(log: Path) -> dict[str, Any]:
    """What the run's own log says: its start, its speed, and the judgement of the held-out images, percent."""
    events = [json.loads(line) for line in log.read_text().splitlines()]
    start = next(event for event in events if event["event"] == "start")
    judged = [event for event in events if event["event"] == "judged"][-1]
    clean, robust = 100 * judged["clean"], 100 * judged["robust"]
    steps = [event for event in events if event["event"] == "step"]
    return {
        "start": start,
        "last_step": steps[-1],
        "held_out": {"clean": clean, "robust": robust, "harmonic": harmonic(clean, robust)},
    }


def harmonic(one: float, other: float) -> float:
    return 2 * one * other / (one + other) if one + other else 0.0


def evaluate(clip: Clip, device: torch.device) -> dict[str, Any]:
    """Percent, per set and on average over the zero-shot sets: clean (all images), pgd100 and worst_* (attacked part).

    The attacked parts of all sets are one batch; each row has the logits of its own set's classes, the others are -inf.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    seen, encoder, scale = pictures(), attackable(clip.image), clip.logit_scale
    names = list(seen.pixels)
    texts, first = [], {}
    for name in names:
        dataset = class_texts(name)
        first[name] = sum(len(part) for part in texts)
        texts.append(label_features(clip.text.encode, *dataset))
    classes = torch.cat(texts)
    found: dict[str, dict[str, float]] = {}
    for name, own in zip(names, texts, strict=True):
        found[name] = {"images": len(seen.labels[name]), "clean": clean_accuracy(encoder, own, seen, name, device)}
    rows = [(seen.pixels[n][seen.attacked[n]], seen.labels[n][seen.attacked[n]] + first[n], n) for n in names]
    pixels = torch.cat([p for p, _, _ in rows]).to(device).float().div(255)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    labels = torch.cat([part for _, part, _ in rows]).to(device)
    of_set = torch.cat([torch.full((len(part),), i) for i, (_, part, _) in enumerate(rows)]).to(device)
    foreign = torch.ones(len(names), len(classes), dtype=torch.bool, device=device)
    for i, (name, own) in enumerate(zip(names, texts, strict=True)):
        foreign[i, first[name] : first[name] + len(own)] = False

    def logits_of(x: Tensor, index: Tensor) -> Tensor:
        parts = x.split(CPU_BATCH if device.type == "cpu" else len(x) or 1)
        logits: Tensor = scale * torch.cat([encoder(part) for part in parts]) @ classes.T
        return logits.masked_fill(foreign[of_set[index]], -torch.inf)

    with torch.no_grad():
        alive = logits_of(pixels, torch.arange(len(pixels), device=device)).argmax(dim=1) == labels
    survivors: dict[str, Tensor] = {"clean_attacked": alive}
    for eps in EPS:
        threat = ThreatModel(norm="linf", eps=eps)
        attacks = [
            (pgd, cross_entropy_loss, Budget(steps=100)),
            (apgd, cross_entropy_loss, Budget(steps=50)),
            (apgd, dlr_loss, Budget(steps=50)),
        ]
        for attack, loss, budget in attacks:
            index = alive.nonzero()[:, 0]
            if len(index):
                result = attack(
                    lambda x, r, index=index: logits_of(x, index[r]),
                    pixels[index],
                    loss(labels[index]),
                    [threat] * len(index),
                    [budget] * len(index),
                    index.tolist(),
                    success=misclassified(labels[index]),
                )
                with torch.no_grad():
                    answers = logits_of(result.pixels, index).argmax(dim=1)
                alive = alive.clone()
                alive[index] = answers == labels[index]
            if attack is pgd and eps == EPS[0]:
                survivors["pgd100"] = alive
        survivors[f"worst_{round(255 * eps)}"] = alive
    for i, name in enumerate(names):
        for key, mask in survivors.items():
            found[name][key] = 100 * float(mask[of_set == i].double().mean())
    keys = ("clean", *survivors)
    average = {key: sum(found[name][key] for name in SETS) / len(SETS) for key in keys}
    average["harmonic"] = harmonic(average["clean"], average["worst_1"])
    return {"average": average, "hashes": seen.hashes, "model_hash": tensors_hash(clip.image), **found}


@cache
def class_texts(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    dataset = open_dataset(str(folder(Path(os.environ["PMGAFT_COMPARE_DATA"]), name)), "test")
    return dataset.class_names, dataset.templates


@torch.no_grad()
def clean_accuracy(encoder: Any, texts: Tensor, seen: Pictures, name: str, device: torch.device) -> float:
    right = 0
    for start in range(0, len(seen.labels[name]), CLEAN_BATCH):
        part = slice(start, start + CLEAN_BATCH)
        pixels = seen.pixels[name][part].to(device).float().div(255).contiguous(memory_format=torch.channels_last)
        right += int(((encoder(pixels) @ texts.T).argmax(dim=1).cpu() == seen.labels[name][part]).sum())
    return 100 * right / len(seen.labels[name])


if __name__ == "__main__":
    main()
