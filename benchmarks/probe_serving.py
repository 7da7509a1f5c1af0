"""What probes cost, and what they cost others.

python benchmarks/probe_serving.py [--quick] [--no-vit]

Three parts, each comparison in turn within each round, so that a busy machine disturbs both sides alike; what counts is
the median over rounds of ratios inside a round:

- plain requests to a real `pmgaft serve mini`: their 95th percentile, alone and while a probe of 100 steps runs;
- one PGD step of eight images, in forwards of the same encoder on the same images (`mini`, and a ViT-B/32 of random
  weights, whose cost does not depend on them);
- the wall clock of one request with Auto-PGD of 100 steps (one loss, one start), and of one with the full report.

The ball is so small that no attack succeeds, and every one spends its whole budget. Writes
results/probe_serving.json and puts the figures into results/summary.json, unless --quick.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from record import RESULTS, cores, machine, summarise
from torch import Tensor

from pmgaft.attacks import Budget, cross_entropy_loss, pgd
from pmgaft.threat import ThreatModel
from pmgaft_export.bundle import load_torchscript, open_bundle
from pmgaft_export.formats import Encoder, write_torchscript
from pmgaft_export.shipped import bundle_for
from pmgaft_serve.bench import Load, Report, Target, drawn, form_message, picture, rotating, run, target_of
from pmgaft_serve.client import Client, Question
from pmgaft_serve.engines import differentiable
from pmgaft_serve.probing import ProbePolicy
from pmgaft_serve.service import Settings
from pmgaft_serve.torchserve import ServeOptions, serving

LABELS = [f"thing {number}" for number in range(100)]
EPS = "0.0001/255"
BATCH = 8
PROBE = {"eps": EPS, "steps": 100}
APGD_100 = {"eps": EPS, "steps": 100, "attack": "apgd", "losses": ["ce"], "restarts": 1}
FULL = {
    "eps": EPS, "steps": 100, "min_eps": True, "targets": 3, "health": True, "square": 100, "survival": True,
    "wording": "simple", "synonyms": ["object"], "certify": 0.1, "draws": 1000, "return_image": True,
}  # fmt: skip
LOADS: dict[str, dict[str, Any]] = {
    "one client": {"concurrency": 1},
    "eight clients": {"concurrency": 8},
    "twenty a second": {"concurrency": 32, "rate": 20.0},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured. seconds: of each load."""

    rounds: int
    seconds: float
    warmup: float
    steps: int
    calls: int


THOROUGH = Effort(rounds=5, seconds=8.0, warmup=1.0, steps=20, calls=5)
QUICK = Effort(rounds=1, seconds=1.5, warmup=0.3, steps=2, calls=1)


def shown(report: Report) -> str:
    times = ", ".join(f"{name} {report.latency_ms.get(name, 0):.1f}" for name in ("p50", "p95", "p99"))
    bad = "" if set(report.statuses) <= {"200"} and not report.unanswered else f"  NOT ALL ANSWERED: {report.statuses}"
    return f"{report.throughput:6.1f}/s, {times} ms{bad}"


@contextmanager
def probing(client: Client, image: bytes) -> Iterator[list[float]]:
    """A probe of 100 steps runs all the time inside: the seconds of those that ended, growing."""
    over, took = threading.Event(), []

    def keep_on() -> None:
        while not over.is_set():
            began = time.perf_counter()
            client.classify(image, Question(labels=LABELS[:10], top_k=1, probe=PROBE))
            took.append(time.perf_counter() - began)

    thread = threading.Thread(target=keep_on)
    thread.start()
    try:
        time.sleep(0.3)  # until the first is at it
        yield took
    finally:
        over.set()
        thread.join()


def plain_under_probe(target: Target, client: Client, effort: Effort) -> dict[str, Any]:
    """The 95th percentile of plain requests, with a probe over without one, for each load."""
    image = picture(500, 375)
    message = rotating([form_message(target, image, one, top_k="5") for one in drawn(LABELS, 10, 50)])
    result: dict[str, Any] = {}
    for name, shape in LOADS.items():
        load = Load(target=target, message=message, seconds=effort.seconds, warmup=effort.warmup, **shape)
        rounds = []
        for number in range(effort.rounds):
            reports: dict[str, Report] = {}
            probes: list[float] = []
            for phase in ("plain", "probed") if number % 2 == 0 else ("probed", "plain"):
                if phase == "plain":
                    reports[phase] = run(load)
                else:
                    with probing(client, image) as probes:
                        reports[phase] = run(load)
                click.echo(f"  {name:16} {phase:7} {shown(reports[phase])}")
            ratio = reports["probed"].latency_ms["p95"] / reports["plain"].latency_ms["p95"]
            rounds.append({
                "p95_ratio": ratio,
                "probe_seconds": [round(seconds, 3) for seconds in probes],
                **{phase: report.to_json() for phase, report in reports.items()},
            })  # fmt: skip
        result[name] = {"p95_ratio": statistics.median(one["p95_ratio"] for one in rounds), "rounds": rounds}
        click.echo(f"  {name:16} p95 with a probe / without: {result[name]['p95_ratio']:.2f}")
    return result


def step_over_forward(encode: Callable[[Tensor], Tensor], size: tuple[int, int], effort: Effort) -> dict[str, Any]:
    """One PGD step of a batch, in forwards of it; the attack's own first and last looks are counted as steps' cost."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(BATCH, 3, *size, generator=generator)
    with torch.no_grad():
        width = encode(pixels[:1]).shape[1]
    texts = torch.nn.functional.normalize(torch.randn(10, width, generator=generator), dim=1)
    labels = torch.zeros(BATCH, dtype=torch.int64)

    def forwards() -> None:
        with torch.no_grad():
            for _ in range(effort.steps):
                encode(pixels)

    def steps() -> None:
        pgd(
            lambda x, rows: 30 * encode(x) @ texts.T,
            pixels,
            cross_entropy_loss(labels),
            [ThreatModel(eps=1 / 255)] * BATCH,
            [Budget(steps=effort.steps)] * BATCH,
            list(range(BATCH)),
        )

    for _ in range(3):  # TorchScript compiles at its second run, and at its first with a gradient
        forwards()
        steps()
    ratios, times = [], []
    for _ in range(effort.rounds):
        forward, step = (seconds(work) / effort.steps for work in (forwards, steps))
        ratios.append(step / forward)
        times.append({"forward_seconds": forward, "step_seconds": step})
    return {"batch": BATCH, "threads": torch.get_num_threads(), "ratio": statistics.median(ratios), "rounds": times}


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def calls(client: Client, effort: Effort) -> dict[str, Any]:
    """Wall clock of single requests, the server otherwise idle."""
    image, result = picture(500, 375), {}
    for name, probe in (("apgd100", APGD_100), ("full_report", FULL)):
        question = Question(labels=LABELS[:10], probe=probe)
        client.classify(image, question)
        times = [seconds(lambda question=question: client.classify(image, question)) for _ in range(effort.calls)]
        found = client.classify(image, question).probe
        assert found is not None
        result[name] = {
            "seconds": statistics.median(times),
            "calls": times,
            "probe": probe,
            "verdict": found.verdict,
            "gradients": found.gradients,
            "forwards": found.forwards,
            "unfinished": found.unfinished,
        }
        click.echo(f"  {name}: {statistics.median(times):.2f} s, {found.gradients} gradients, {found.verdict}")
    return result


def random_vit() -> Callable[[Tensor], Tensor]:
    """As a bundle holds it for probes."""
    import open_clip

    from pmgaft.clip.image import PixelEncoder, freeze

    torch.manual_seed(0)
    tower = open_clip.create_model("ViT-B-32", load_weights=False).visual
    encoder = freeze(PixelEncoder(tower, (0.5,) * 3, (0.5,) * 3, (224, 224)))
    with tempfile.TemporaryDirectory(prefix="pmgaft-bench-") as scratch:
        path = Path(scratch, "image.pt")
        write_torchscript(Encoder(module=encoder, example=torch.rand(2, 3, 224, 224), dynamic={0: "batch"}), path)
        return load_torchscript(path)


@click.command()
@click.option("--quick", is_flag=True, help="A smoke test: one short round, no ViT, nothing written.")
@click.option("--vit/--no-vit", default=True, show_default=True, help="A step of a ViT-B/32 of random weights, too.")
def main(quick: bool, vit: bool) -> None:
    effort, torch_threads = (QUICK if quick else THOROUGH), cores()
    torch.set_num_threads(torch_threads)
    result: dict[str, Any] = {"machine": machine(), "effort": asdict(effort)}
    bundle = open_bundle(bundle_for("mini"))
    click.echo("one step, in forwards")
    encode = differentiable(bundle, torch.device("cpu"))
    result["step"] = {"mini": step_over_forward(encode, bundle.preprocess.size, effort)}
    if vit and not quick:
        result["step"]["vit_b32_random"] = step_over_forward(random_vit(), (224, 224), effort)
    for name, one in result["step"].items():
        click.echo(f"  {name}: {one['ratio']:.2f}")
    settings = Settings(threads=cores(), decoders=cores(), probe=ProbePolicy(images=True, seconds=120.0))
    with (
        serving(ServeOptions(bundle=bundle.directory, port=0, settings=settings)) as server,
        Client(server.url, timeout=600) as client,
    ):
        client.classify(picture(64, 64), Question(labels=LABELS, top_k=1))  # from now on, all labels are known
        click.echo("one request")
        result["calls"] = calls(client, effort)
        click.echo("plain requests, without and with a probe of 100 steps")
        result["plain"] = plain_under_probe(target_of(server.url), client, effort)
    figures = {
        "probe.plain_p95_ratio_under_probe": max(one["p95_ratio"] for one in result["plain"].values()),
        "probe.step_over_forward": max(one["ratio"] for one in result["step"].values()),
        "probe.apgd100_mini_seconds": result["calls"]["apgd100"]["seconds"],
        "probe.full_report_mini_seconds": result["calls"]["full_report"]["seconds"],
    }
    click.echo(json.dumps(figures, indent=1))
    if quick:
        return
    (RESULTS / "probe_serving.json").write_text(json.dumps(result | {"figures": figures}, indent=1) + "\n")
    summarise(figures)


if __name__ == "__main__":
    main()
