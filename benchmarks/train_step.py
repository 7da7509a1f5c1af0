"""One optimiser step of PMG-AFT with PGD-2: ours, the way of the released code, and the floor counted in forwards.

python benchmarks/train_step.py                 a ViT-B/32 with random weights, and mini; batch 16, float32, on the CPU
python benchmarks/train_step.py --device cuda   the same with batch 256 and the objective in bf16, on a GPU
python benchmarks/train_step.py --quick         a tiny model: whether everything runs, no figures to keep

plain  What the released code does, written anew from its description: the prompts are tokenised in every step and the
       text tower runs inside every attack step, the attack's backward reaches every parameter, the guide keeps a graph,
       nothing is detached, adversarial and clean images are encoded apart.
ours   `pmgaft.training.step.accumulate_gradients`, the gradient's norm, and the same optimiser, as `pmgaft train` does.
eager  ours on the tower as it is loaded: BatchNorm apart, no products, channels first, not compiled.
floor  5 F + 6 I: two attack steps 2 (F + I), the student's forward and backward over adversarial and clean images
       2 (F + 2 I), the guide's forward F; F is a measured forward, I a measured input gradient, and a parameter
       gradient is taken to cost an input gradient. Measured on the tower as it is loaded, each part in its precision.

The variants take turns inside every round, so that all feel the same noise; ratios are medians over rounds. Memory on
the CPU is the peak resident size of a process that does nothing else, so it holds Python and torch, too. Counted
operations are the model's: 11 forwards of the image tower an image (2 x 2 + 2 x 3 + 1), whatever was computed besides.
"""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import open_clip
import torch
from record import RESULTS, machine, summarise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pmgaft.attacks import Budget
from pmgaft.clip.image import PixelEncoder, fold_batchnorm, freeze, frozen_copy
from pmgaft.clip.loading import load_clip, quietly
from pmgaft.clip.products import as_products
from pmgaft.device import float32_products
from pmgaft.evaluation.run import nothing_in_place
from pmgaft.objectives import PmgAft
from pmgaft.threat import ThreatModel
from pmgaft.training.step import Learner, accumulate_gradients, frozen_view

EPS = 1 / 255
STEPS = 2
FORWARDS = 2 * STEPS + 2 * 3 + 1
RATE = 1e-5
RELEASE_CLASSES = 200
NAMES = ("vit_b32", "mini")

Step = Callable[[Tensor, Tensor], None]
"""One optimiser step. pixels: float32 [B, 3, H, W] in [0, 1]; labels: int64 [B]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """bf16: autocast of ours' objective (the attack stays in float32 but for variants more) and of all of plain."""

    device: str
    batch: int
    classes: int
    bf16: bool
    compiled: bool
    rounds: int
    warmup: int
    steps_a_turn: int

    def autocast(self, enabled: bool = True) -> AbstractContextManager[object]:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16 and enabled)


@dataclass(frozen=True, slots=True)
class Model:
    """An open_clip model, its image tower with the normalisation in front, and its tokenizer."""

    clip: Any
    encoder: PixelEncoder
    tokenize: Callable[[list[str]], Tensor]


def build(name: str, device: str) -> Model:
    """A ViT-B/32 and a tiny ViT with random weights, or the shipped mini; all parameters trainable, as if just made."""
    torch.manual_seed(0)
    if name == "mini":
        clip = load_clip("mini")
        model, mean, std, size = clip.open_clip_model, clip.preprocess.mean, clip.preprocess.std, clip.preprocess.size
        config = "ViT-B-32"
        context = clip.tokenizer.context_length
    else:
        config = "ViT-B-32-quickgelu"
        tiny = {
            "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2},
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
        }
        with quietly():
            model = open_clip.CLIP(32, **tiny) if name == "tiny" else open_clip.create_model(config, pretrained=None)
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        size, context = (32, 32) if name == "tiny" else (224, 224), 77
    model.to(device).requires_grad_(True)
    tower: Any = model.visual
    tokenizer = open_clip.get_tokenizer(config)
    tokenize = partial(tokenizer, context_length=context)
    return Model(model, PixelEncoder(tower, mean, std, size).to(device), tokenize)


def prompts(classes: int) -> list[str]:
    return [f"This is a photo of a thing of kind {number}" for number in range(classes)]


def optimizer_of(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=RATE, momentum=0.9)


# --- the variants


def plain(model: Model, settings: Settings) -> Step:
    """The released code's step, from its description."""
    target, original = model, copy.deepcopy(model)
    texts = prompts(settings.classes)
    optimizer = optimizer_of(list(target.clip.visual.parameters()))

    def cosines(of: Model, pixels: Tensor, tokens: Tensor) -> Tensor:
        encoded = F.normalize(of.clip.encode_text(tokens), dim=-1)
        return F.normalize(of.encoder.raw(pixels), dim=-1) @ encoded.T

    def step(pixels: Tensor, labels: Tensor) -> None:
        target.clip.visual.train()
        optimizer.zero_grad()
        tokens = target.tokenize(texts).to(pixels.device)
        with settings.autocast():
            delta = torch.empty_like(pixels).uniform_(-EPS, EPS)
            delta = ((pixels + delta).clamp(0, 1) - pixels).requires_grad_()
            for _ in range(STEPS):
                F.cross_entropy(cosines(target, pixels + delta, tokens), labels).backward()  # type: ignore[no-untyped-call]
                assert delta.grad is not None
                moved = (delta + EPS * delta.grad.sign()).clamp(-EPS, EPS).detach()
                delta = ((pixels + moved).clamp(0, 1) - pixels).requires_grad_()
            attacked = (pixels + delta).detach()
            adversarial = cosines(target, attacked, tokens)
            guide = cosines(original, attacked, tokens)
            clean = cosines(target, pixels, tokens)
            loss = F.cross_entropy(adversarial, labels)
            for teacher in (guide, clean):
                loss = loss + F.kl_div(adversarial.log_softmax(1), teacher.softmax(1), reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        target.clip.logit_scale.data.clamp_(0, 4.6052)
        (adversarial.argmax(dim=1) == labels).float().mean().item()

    return step


def ours(
    model: Model, settings: Settings, *, prepared: bool = True, tf32: bool = False, bf16_attack: bool = False
) -> Step:
    """The step of `pmgaft train`. prepared: folded, as products and channels last, and compiled if the settings say so.
    tf32: what the attack multiplies in float32."""
    prepare = fold_batchnorm if prepared else copy.deepcopy
    layout = torch.channels_last if prepared else torch.contiguous_format
    student = nothing_in_place(prepare(model.encoder).eval().requires_grad_(True).to(memory_format=layout))
    if prepared:
        as_products(student)
    guide = freeze(frozen_copy(student))
    attacked = freeze(frozen_view(student))
    if settings.compiled and prepared:
        for encoder in (student, guide, attacked):
            encoder.tower.compile()
    with torch.no_grad():
        tokens = model.tokenize(prompts(settings.classes)).to(settings.device)
        texts = F.normalize(model.clip.encode_text(tokens), dim=-1)
    learner = Learner(
        student=student,
        attacked=attacked,
        guide=guide,
        objective=PmgAft(),
        texts=texts,
        guide_texts=texts,
        scale=100.0,
        precision=torch.bfloat16 if settings.bf16 else torch.float32,
        attack_precision=torch.bfloat16 if bf16_attack else torch.float32,
    )
    optimizer = optimizer_of(list(student.parameters()))
    done = 0

    def step(pixels: Tensor, labels: Tensor) -> None:
        nonlocal done
        optimizer.zero_grad(set_to_none=True)
        with float32_products(tf32=tf32):
            accumulate_gradients(
                learner,
                pixels.contiguous(memory_format=layout),
                labels,
                range(done, done + len(labels)),
                threat=ThreatModel(norm="linf", eps=EPS),
                budget=Budget(steps=STEPS, step_size=EPS),
                micro_batch=len(labels),
            )
        nn.utils.get_total_norm([p.grad for p in student.parameters() if p.grad is not None])
        optimizer.step()
        done += len(labels)

    return step


VARIANTS: dict[str, Callable[[Model, Settings], Step]] = {
    "ours": ours,
    "eager": partial(ours, prepared=False),
    "ours_tf32_attack": partial(ours, tf32=True),
    "ours_bf16_attack": partial(ours, bf16_attack=True),
    "plain": plain,
}
OTHER_ATTACKS = ("tf32_attack", "bf16_attack")
"""Of variants that are measured beside the float32 attack where the objective is in bf16."""


def floor_parts(model: Model, settings: Settings) -> dict[str, Step]:
    """A forward, and a forward with the input gradient, also in the attack's float32: what the floor is counted in."""
    encoder = frozen_copy(model.encoder)

    def forward(pixels: Tensor, _: Tensor) -> None:
        with torch.no_grad(), settings.autocast():
            encoder.raw(pixels)

    def with_input_gradient(autocast: bool, pixels: Tensor, _: Tensor) -> None:
        x = pixels.clone().requires_grad_()
        with float32_products(tf32=False):
            with settings.autocast(autocast):
                total = encoder.raw(x).sum()
            torch.autograd.grad(total, x)

    parts: dict[str, Step] = {"forward": forward, "forward_and_gradient": partial(with_input_gradient, True)}
    return parts | ({"forward_and_gradient_float32": partial(with_input_gradient, False)} if settings.bf16 else {})


def floor(forward: float, with_gradient: float, in_attack: float) -> float:
    """Seconds: the attack's steps, the student's two forwards and backwards, the guide's forward."""
    gradient = with_gradient - forward
    return STEPS * in_attack + 2 * (forward + 2 * gradient) + forward


# --- measuring


def example(encoder: PixelEncoder, settings: Settings) -> tuple[Tensor, Tensor]:
    """Pixels [B, 3, H, W] and labels [B]: speed does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(settings.batch, 3, *encoder.size, generator=generator)
    labels = torch.arange(settings.batch) % settings.classes
    return pixels.to(settings.device), labels.to(settings.device)


def seconds(work: Callable[[], object], device: str) -> float:
    """How long `work` takes, what it left running on the GPU included."""
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def several(step: Step, times: int, pixels: Tensor, labels: Tensor) -> None:
    for _ in range(times):
        step(pixels, labels)


def measure(name: str, settings: Settings) -> dict[str, Any]:
    """Seconds of every variant in every round, the floor, memory and counted operations of one model."""
    # first: other processes need the memory that this one would be left with
    peaks = memory_on_cpu(name, settings) if settings.device == "cpu" else {}
    model = build(name, settings.device)
    pixels, labels = example(model.encoder, settings)
    variants = [variant for variant in VARIANTS if settings.bf16 or variant.removeprefix("ours_") not in OTHER_ATTACKS]
    if name == "vit_b32" and not settings.compiled:
        variants.remove("eager")  # without BatchNorm there is nothing to prepare
    steps = floor_parts(model, settings)
    for variant in variants:
        before = torch.cuda.memory_allocated() if settings.device == "cuda" else 0
        steps[variant] = VARIANTS[variant](model, settings)  # plain, the last, trains the model itself
        if settings.device == "cuda":
            for _ in range(2):  # the first one makes the optimiser's state
                torch.cuda.reset_peak_memory_stats()
                steps[variant](pixels, labels)
            peaks[variant] = torch.cuda.max_memory_allocated() - before
    rounds: dict[str, list[float]] = {variant: [] for variant in steps}
    for turn in range(settings.warmup + settings.rounds):
        for variant, step in steps.items():
            took = seconds(partial(several, step, settings.steps_a_turn, pixels, labels), settings.device)
            if turn >= settings.warmup:
                rounds[variant].append(took / settings.steps_a_turn)
    forward, gradient = rounds["forward"], rounds["forward_and_gradient"]
    floors = {"floor": gradient}
    if settings.bf16:
        floors = {"floor": rounds["forward_and_gradient_float32"], "floor_bf16_attack": gradient}
    for label, in_attack in floors.items():
        rounds[label] = [floor(*parts) for parts in zip(forward, gradient, in_attack, strict=True)]
    operations = FORWARDS * forward_operations(model.encoder)
    return {
        "seconds": {variant: [round(value, 5) for value in values] for variant, values in rounds.items()},
        "images_per_second": {v: settings.batch / statistics.median(rounds[v]) for v in variants},
        "tera_operations_an_image": operations / 1e12,
        "peak_bytes": peaks,
    }


def forward_operations(encoder: PixelEncoder) -> int:
    """Multiplications and additions of one image's forward. Counted with gradients on: without, torch hides some."""
    pixels = torch.zeros(1, 3, *encoder.size, device=encoder.mean.device, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        encoder.raw(pixels)
    return int(counter.get_total_flops())


def memory_on_cpu(name: str, settings: Settings) -> dict[str, int]:
    """Peak resident bytes of ours and plain, each in a process of its own; plain with half the classes, too."""
    wanted = {"ours": settings.classes, "plain": settings.classes, "plain_with_half_the_classes": settings.classes // 2}
    peaks: dict[str, int] = {}
    for label, classes in wanted.items():
        changed = json.dumps(asdict(settings) | {"classes": classes})
        command = [sys.executable, __file__, "--memory-of", name, label.partition("_")[0], changed]
        peaks[label] = int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    more_classes = (RELEASE_CLASSES - settings.classes) / (settings.classes - settings.classes // 2)
    grown = round(more_classes * (peaks["plain"] - peaks["plain_with_half_the_classes"]))
    return peaks | {f"plain_with_{RELEASE_CLASSES}_classes_by_extrapolation": peaks["plain"] + grown}


def memory_of(name: str, variant: str, settings: Settings) -> int:
    """Peak resident bytes of this process after three steps."""
    model = build(name, settings.device)
    pixels, labels = example(model.encoder, settings)
    step = VARIANTS[variant](model, settings)
    for _ in range(3):
        step(pixels, labels)
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent's size as well
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def matrix_peak(settings: Settings, size: int) -> float:
    """Operations a second of the best of ten products of two random square matrices, in the objective's precision."""
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    a, b = (torch.randn(size, size, device=settings.device).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    seconds(lambda: None, settings.device)
    return 2.0 * size * size * size / min(seconds(lambda: a @ b, settings.device) for _ in range(10))


def figures(name: str, found: dict[str, Any], peak: float) -> dict[str, float]:
    """The ratios of one model; without a name in front for the ViT-B/32."""
    times, memory = found["seconds"], found["peak_bytes"]

    def ratio(one: str, other: str) -> float:
        return float(statistics.median(a / b for a, b in zip(times[one], times[other], strict=True)))

    result = {
        "images_per_second": found["images_per_second"]["ours"],
        "speedup_over_plain": ratio("plain", "ours"),
        "step_over_floor": ratio("ours", "floor"),
        "peak_memory_over_plain": memory["ours"] / memory["plain"],
        "share_of_matrix_peak": found["tera_operations_an_image"] * found["images_per_second"]["ours"] * 1e12 / peak,
    }
    if "eager" in times:
        result["images_per_second_over_eager"] = ratio("eager", "ours")
    for attack in OTHER_ATTACKS:
        if f"ours_{attack}" in times:
            rate = found["images_per_second"][f"ours_{attack}"]
            result[f"{attack}_images_per_second"] = rate
            result[f"{attack}_share_of_matrix_peak"] = found["tera_operations_an_image"] * rate * 1e12 / peak
    if "floor_bf16_attack" in times:
        result["bf16_attack_step_over_floor"] = ratio("ours_bf16_attack", "floor_bf16_attack")
    front = "" if name == "vit_b32" else f"{name}_"
    return {f"{front}{key}": round(value, 4) for key, value in result.items()}


def summarize() -> None:
    """Take the figures of both results, as far as they are there, into summary.json."""
    known: dict[str, float] = {}
    for source, front in (("train_step.json", "train."), ("train_step_cuda.json", "train.gpu_")):
        if (RESULTS / source).is_file():
            found = json.loads((RESULTS / source).read_text())["figures"]
            known |= {front + name: value for name, value in found.items()}
    summarise(known)


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--batch", type=int, help="Images a step; left out: 16 on the CPU, 256 on a GPU.")
@click.option("--classes", default=50, show_default=True)
@click.option("--bf16/--no-bf16", default=None, help="Autocast; left out: on a GPU.")
@click.option("--compile", "compiled", is_flag=True, help="torch.compile ours; takes a minute or more a model.")
@click.option("--rounds", type=int, help="Left out: 5 on the CPU, 8 on a GPU.")
@click.option("--model", "models", multiple=True, type=click.Choice(NAMES), help="Repeatable; left out: both.")
@click.option("--quick", is_flag=True, help="A tiny model, two rounds; no summary is written.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Left out: below results/.")
@click.option("--summarize", "only_summarize", is_flag=True, help="Measure nothing; bring summary.json up to date.")
@click.option("--memory-of", "memory_task", nargs=3, hidden=True)
def main(
    device: str,
    batch: int | None,
    classes: int,
    bf16: bool | None,
    compiled: bool,
    rounds: int | None,
    models: tuple[str, ...],
    quick: bool,
    output: Path | None,
    only_summarize: bool,
    memory_task: tuple[str, str, str] | None,
) -> None:
    """Measure one optimiser step; writes results/train_step.json, on a GPU results/train_step_cuda.json."""
    if only_summarize:
        summarize()
        return
    if memory_task:
        name, variant, settings_json = memory_task
        print(memory_of(name, variant, Settings(**json.loads(settings_json))))
        return
    gpu = device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise click.ClickException("torch sees no CUDA device here")
    settings = Settings(
        device=device,
        batch=batch or (4 if quick else 256 if gpu else 16),
        classes=classes,
        bf16=gpu if bf16 is None else bf16,
        compiled=compiled,
        rounds=rounds or (2 if quick else 8 if gpu else 5),
        warmup=2 if gpu else 1,
        steps_a_turn=3 if gpu else 1,  # a GPU works on while the next step is being asked for
    )
    peak = matrix_peak(settings, 8192 if gpu else 256 if quick else 4096)
    result: dict[str, Any] = {
        "settings": asdict(settings),
        "machine": machine(("torch", "open_clip_torch")),
        "matrix_peak_tera_operations_a_second": peak / 1e12,
        "figures": {},
        "models": {},
    }
    for name in ("tiny",) if quick else models or NAMES:
        found = measure(name, settings)
        result["models"][name] = found
        result["figures"] |= figures(name, found, peak)
        print(json.dumps(result["figures"], indent=2), flush=True)
    if quick and output is None:
        return
    target = output or RESULTS / ("train_step_cuda.json" if gpu else "train_step.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {target}")
    if output is None:
        summarize()


if __name__ == "__main__":
    main()
