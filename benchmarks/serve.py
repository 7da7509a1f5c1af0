"""How fast `pmgaft serve` answers, against the encoder by itself and against two other ways of serving a CLIP.

python benchmarks/serve.py [--quick] [--part NAME ...] [--parity-data DATASET]
python benchmarks/serve.py --table      # only writes docs/serving.md's tables anew, from results/serve.json

Parts, in this order: `ceiling` (the encoders in this process, and `pmgaft serve` over HTTP beside them), `labels` (10
and 1,000 known labels), `photos` (JPEGs of 500 x 375 and 4000 x 3000), `peers` (LitServe twice and a plain TorchServe
handler, peers/), `cold` (1,000 labels that nobody has seen), `draft` (answers from JPEGs that were scaled while
decoded), `full` (how soon a server that is asked three times what it can do refuses the rest), `memory`.

Everything that is compared is measured in turn within each round, and what counts is the median over rounds of ratios
inside a round: on a machine that others use too, the rest is noise. The load generator shares the machine with the
server. Writes results/serve.json (with --quick, only prints): every report, the machine, and the figures, which also go
into results/summary.json and, as tables, docs/serving.md.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import torch
from PIL import Image
from record import RESULTS, cores, installed, machine, summarise
from torch import Tensor

from pmgaft.clip.preprocess import open_image, read_pixels, to_pixels
from pmgaft.clip.text import TextEncoder, label_features
from pmgaft.errors import ServerError
from pmgaft_export.bundle import Bundle, open_bundle
from pmgaft_serve.bench import Load, Report, Target, drawn, form_message, picture, rotating, run, target_of
from pmgaft_serve.engines import LANES, Encode, Engine, open_engine, open_lane
from pmgaft_serve.ranking import rank
from pmgaft_serve.service import Settings
from pmgaft_serve.torchserve import ServeOptions, Server, free_ports, serving

HERE = Path(__file__).parent
GUIDE = HERE.parent / "docs" / "serving.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
CPU = torch.device("cpu")
LABELS = [f"thing {number}" for number in range(1000)]
CONCURRENCY = (1, 8, 32)
JAVA_REQUESTS = 10_000
FULL_AT = 16  # requests in work
NOISES = 10  # for each picture
ALONE = ("decode", "encode")  # what a request cannot do without, measured by itself
FORMATS = ("torchscript", "onnx", "onnx-int8")
PACKAGES = ("torch", "onnxruntime-gpu", "torchserve", "open_clip_torch", "pillow", "litserve", "pmgaft")

Figures = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured. seconds: of each load."""

    rounds: int
    seconds: float
    warmup: float
    memory_requests: int
    models: tuple[str, ...]


FULL = Effort(rounds=3, seconds=6.0, warmup=1.5, memory_requests=20_000, models=("mini", "vit_b32"))
QUICK = Effort(rounds=1, seconds=1.0, warmup=0.3, memory_requests=200, models=("mini",))


class Results:
    """What was measured so far."""

    def __init__(self) -> None:
        self.figures: Figures = {}
        self.reports: list[dict[str, Any]] = []
        self.tables: dict[str, Any] = {}

    def report(self, report: Report, **what: object) -> Report:
        """Keep one load's report, under what it was of."""
        self.reports.append({**what, **report.to_json()})
        names = " ".join(f"{name}={value}" for name, value in what.items())
        times = ", ".join(f"{name} {report.latency_ms.get(name, 0):.1f}" for name in ("p50", "p95", "p99"))
        print(f"  {names}: {report.throughput:.1f}/s, {times} ms", flush=True)
        if set(report.statuses) - {"200"} or report.unanswered:
            print(f"    not answered: {report.statuses} {report.codes} {report.unanswered}", flush=True)
        return report

    def figure(self, name: str, value: float) -> None:
        """Keep one figure."""
        self.figures[name] = float(f"{value:.5g}")
        print(f"{name:<50} {value:.4g}", flush=True)


def random_vit(scratch: Path) -> str:
    """ViT-B-32-quickgelu with random weights, in open_clip's local-dir form: speed, not accuracy, is asked of it."""
    import open_clip

    from pmgaft.clip.loading import save_local_dir

    name = "ViT-B-32-quickgelu"
    torch.manual_seed(0)
    model = open_clip.create_model(name, load_weights=False)
    preprocess = open_clip.get_model_preprocess_cfg(model)
    kept = {key: preprocess[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": kept}
    save_local_dir(model, config, scratch / "vit-b32")
    return f"local-dir:{scratch / 'vit-b32'}"


def export(model: str, target: Path, parity_data: str | None) -> Bundle:
    """A bundle with every format that a CPU may serve."""
    command = [sys.executable, "-m", "pmgaft", "export", model, "--output-dir", str(target), "--device", "cpu"]
    command += [word for name in FORMATS for word in ("--format", name)]
    command += ["--parity-data", parity_data, "--parity-images", "2000"] if parity_data else []
    subprocess.run(command, check=True)
    return open_bundle(target)


@contextmanager
def serve(bundle: Bundle, engine: str = "auto", **settings: Any) -> Iterator[tuple[Server, Target]]:
    """`pmgaft serve` as it comes, on a free port, all 1,000 labels known, and Java as fast as it will be.

    Java compiles what runs often, and for that takes several times a request's share of the processor in the first
    thousands of requests; the encoder is spared them, as they are refused.
    """
    chosen = Settings(threads=cores(), decoders=cores(), **settings)
    with serving(ServeOptions(bundle=bundle.directory, port=0, engine=engine, settings=chosen)) as server:
        target = target_of(server.url)
        refused = form_message(target, picture(500, 375), [])
        run(Load(target=target, message=lambda number: refused, concurrency=8, seconds=600, requests=JAVA_REQUESTS))
        known = form_message(target, picture(64, 64), LABELS, top_k="1")
        once(target, known)
        yield server, target


def once(target: Target, message: bytes) -> None:
    """One request that takes what it takes."""
    load = Load(target=target, message=lambda number: message, concurrency=1, seconds=1200, requests=1, timeout=1200)
    if (report := run(load)).statuses != {"200": 1}:
        raise SystemExit(f"a first request was not answered: {report}")


def messages(target: Target, image: bytes, labels: int) -> Callable[[int], bytes]:
    """Requests with different lists of known labels, in rotation."""
    lists = drawn(LABELS, labels, 200 if len(image) < 2**20 else 8)
    return rotating([form_message(target, image, one, top_k="5") for one in lists])


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


# the parts


def ceiling_part(results: Results, effort: Effort, bundles: Mapping[str, Bundle]) -> None:
    """The best engine by itself, and over HTTP at 32 at once, in turn; and what a lone request adds."""
    image = picture(500, 375)
    for model, bundle in bundles.items():
        for name, engine in engines(bundle).items():
            with serve(bundle, engine) as (server, target):
                direct = open_engine(bundle, engine, CPU, cores())
                lane = open_lane(bundle, direct.format, CPU, cores())
                single, beside, over_http, ratios, added, spent = [], [], [], [], [], []
                for _ in range(effort.rounds):
                    best = max(images_a_second(direct.image, bundle, size, effort.seconds / 3) for size in (1, 8, 32))
                    load = Load(
                        target=target,
                        message=messages(target, image, 10),
                        concurrency=32,
                        seconds=effort.seconds,
                        warmup=effort.warmup,
                    )
                    with processor_seconds(server) as used:
                        answer = run(load)
                    report = results.report(answer, part="ceiling", model=model, engine=name, concurrency=32)
                    spent.append(per_request(used, report))
                    lone = results.report(
                        run(replace(load, concurrency=1)), part="ceiling", model=model, engine=name, concurrency=1
                    )
                    call = direct_call(direct, bundle, image, effort.seconds / 3)
                    single.append(best)
                    if lane is not None:
                        sizes = (1, 8, 32 // LANES)
                        rates = (images_a_second(lane, bundle, size, effort.seconds / 3, LANES) for size in sizes)
                        beside.append(max(rates))
                    over_http.append(report.throughput)
                    ratios.append(report.throughput / best)
                    added.append(lone.latency_ms["p50"] - call)
                alone = {"decode": decode_cost(bundle, image), "encode": encode_cost(direct, bundle)}
            costs = alone | {process: median([one[process] for one in spent]) for process in spent[0]}
            results.tables.setdefault("processor_ms", {})[f"{model}_{name}"] = costs
            print(f"  processor ms a request: {costs}", flush=True)
            results.figure(f"ceiling.images_per_second.{model}_{name}", median(single))
            results.figure(f"serve.requests_per_second.{model}_{name}_c32", median(over_http))
            results.figure(f"serve.http_over_ceiling.{model}_{name}_c32", median(ratios))
            results.figure(f"serve.lone_request_added_ms.{model}_{name}", median(added))
            if beside:
                lanes = zip(over_http, beside, strict=True)
                results.figure(f"ceiling_lanes.images_per_second.{model}_{name}", median(beside))
                results.figure(f"serve.http_over_lanes.{model}_{name}_c32", median([one / two for one, two in lanes]))
    figures = results.figures
    for model in bundles:  # under the names that summary.json is asked for
        if f"serve.http_over_ceiling.{model}_fp32_c32" in figures:
            results.figure(f"serve.http_over_ceiling.{model}_c32", figures[f"serve.http_over_ceiling.{model}_fp32_c32"])
    results.figure(
        "serve.lone_request_added_ms",
        max(value for name, value in figures.items() if name.startswith("serve.lone_request_added_ms.")),
    )


def engines(bundle: Bundle) -> dict[str, str]:
    """Short name -> what `--engine` takes: the fp32 one, and int8 where the bundle holds it."""
    return {"fp32": "onnx"} | ({"int8": "onnx-int8"} if "onnx-int8" in bundle.manifest.formats else {})


def images_a_second(encode: Encode, bundle: Bundle, size: int, seconds: float, lanes: int = 1) -> float:
    """By the encoder alone, pixels at hand, batches of one size, in so many lanes beside each other; after one batch in
    each that is not counted.
    """
    pixels = torch.rand(size, 3, *bundle.preprocess.size)

    def one_lane(end: float) -> int:
        count = 0
        while time.perf_counter() < end:
            encode(pixels)
            count += size
        return count

    with ThreadPoolExecutor(lanes) as threads:
        list(threads.map(encode, [pixels] * lanes))
        start = time.perf_counter()
        count = sum(threads.map(one_lane, [start + seconds] * lanes))
        return count / (time.perf_counter() - start)


@contextmanager
def processor_seconds(server: Server) -> Iterator[dict[str, float]]:
    """What the front end, the worker and this process, which sends the load, use inside the `with` block; and "all",
    the seconds that it lasts.
    """
    known = server.processes() | {"load generator": os.getpid()}
    names = {"torchserve": "front end", "worker 0": "worker"}

    def seconds() -> dict[str, float]:
        times = {name: psutil.Process(pid).cpu_times() for name, pid in known.items()}
        return {names.get(name, name): one.user + one.system for name, one in times.items()}

    used: dict[str, float] = {}
    before, start = seconds(), time.perf_counter()
    yield used
    used |= {name: after - before[name] for name, after in seconds().items()}
    used["all"] = time.perf_counter() - start


def per_request(used: Mapping[str, float], report: Report) -> dict[str, float]:
    """Processor milliseconds of each process for one request; "idle": what the cores had left."""
    requests = report.throughput * used["all"]
    costs = {name: 1000 * seconds / requests for name, seconds in used.items() if name != "all"}
    return costs | {"idle": 1000 * cores() / report.throughput - sum(costs.values())}


def decode_cost(bundle: Bundle, image: bytes, times: int = 100) -> float:
    """Processor milliseconds of one file to pixels, by itself."""
    begun = time.process_time()
    for _ in range(times):
        read_pixels(image, bundle.preprocess)
    return 1000 * (time.process_time() - begun) / times


def encode_cost(engine: Engine, bundle: Bundle, size: int = 32, times: int = 5) -> float:
    """Processor milliseconds of one image in a batch, by the encoder alone."""
    pixels = torch.rand(size, 3, *bundle.preprocess.size)
    engine.image(pixels)
    begun = time.process_time()
    for _ in range(times):
        engine.image(pixels)
    return 1000 * (time.process_time() - begun) / (size * times)


def direct_call(engine: Engine, bundle: Bundle, image: bytes, seconds: float) -> float:
    """Milliseconds, median: a file decoded, encoded and ranked in this process, labels known."""
    text = torch.nn.functional.normalize(torch.randn(10, bundle.manifest.embed_dim), dim=1)
    times: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 3:
        begun = time.perf_counter()
        features = engine.image(read_pixels(image, bundle.preprocess).unsqueeze(0))[0]
        rank(features, text, bundle.manifest.logit_scale, LABELS[:10], 5)
        times.append(1000 * (time.perf_counter() - begun))
    return median(times)


def labels_part(results: Results, effort: Effort, bundles: Mapping[str, Bundle]) -> None:
    """What 1,000 known labels cost beside 10, as throughput at every concurrency."""
    image = picture(500, 375)
    for model, bundle in bundles.items():
        ratios = []
        with serve(bundle) as (_, target):
            for _ in range(effort.rounds):
                for concurrency in CONCURRENCY:
                    reports = {}
                    for labels in shuffled((10, 1000)):
                        load = Load(
                            target=target,
                            message=messages(target, image, labels),
                            concurrency=concurrency,
                            seconds=effort.seconds,
                            warmup=effort.warmup,
                        )
                        what = {"part": "labels", "model": model, "labels": labels, "concurrency": concurrency}
                        reports[labels] = results.report(run(load), **what)
                    ratios.append(reports[10].throughput / reports[1000].throughput)
        results.figure(f"serve.known_1000_over_10_labels.{model}", median(ratios))
    last = list(bundles)[-1]
    results.figure("serve.known_1000_over_10_labels", results.figures[f"serve.known_1000_over_10_labels.{last}"])


def photos_part(results: Results, effort: Effort, bundles: Mapping[str, Bundle]) -> None:
    """Small and large JPEGs, by the engine that `pmgaft serve` chooses."""
    pictures = {"500x375": picture(500, 375), "4000x3000": picture(4000, 3000)}
    print({name: f"{len(content):,} bytes" for name, content in pictures.items()})
    for model, bundle in bundles.items():
        with serve(bundle) as (_, target):
            for _ in range(effort.rounds):
                for concurrency in CONCURRENCY:
                    for name in shuffled(tuple(pictures)):
                        load = Load(
                            target=target,
                            message=messages(target, pictures[name], 10),
                            concurrency=concurrency,
                            seconds=effort.seconds,
                            warmup=effort.warmup,
                        )
                        what = {"part": "photos", "model": model, "jpeg": name, "concurrency": concurrency}
                        results.report(run(load), **what)


def peers_part(results: Results, effort: Effort, bundle: Bundle, model: str) -> None:
    """All servers up at once, and loaded in turn; ours by the fp32 engine and by its best one."""
    image = picture(500, 375)
    with ExitStack() as stack:
        targets: dict[str, Target] = {}
        for name, engine in engines(bundle).items():
            targets[f"pmgaft-{name}"] = stack.enter_context(serve(bundle, engine))[1]
        onnx = bundle.path(bundle.manifest.formats["onnx"].image)
        targets["torchserve-plain"] = stack.enter_context(peer("torchserve_plain.py", model, path="/predictions/plain"))
        if installed("litserve"):
            targets["litserve-plain"] = stack.enter_context(peer("litserve_plain.py", model))
            cached = stack.enter_context(peer("litserve_cached.py", model, "--onnx", str(onnx)))
            targets["litserve-cached"] = cached
            once(cached, form_message(cached, picture(64, 64), LABELS))
        else:
            print("litserve is not installed: left out")
        throughput: dict[tuple[str, int], list[float]] = {}
        for _ in range(effort.rounds):
            for concurrency in CONCURRENCY:
                for name in shuffled(tuple(targets)):
                    load = Load(
                        target=targets[name],
                        message=messages(targets[name], image, 10),
                        concurrency=concurrency,
                        seconds=effort.seconds,
                        warmup=effort.warmup,
                        timeout=600,
                    )
                    if name.endswith("plain"):  # seconds a request: count requests, not time
                        load = replace(load, requests=concurrency + 4, seconds=600)
                    report = results.report(run(load), part="peers", server=name, concurrency=concurrency)
                    throughput.setdefault((name, concurrency), []).append(report.throughput)
    peers_figures(results, throughput)


def peers_figures(results: Results, throughput: Mapping[tuple[str, int], Sequence[float]]) -> None:
    """Ratios inside a round, their median over rounds, the worst over concurrencies."""
    names = {name for name, _ in throughput}

    def over(ours: str, theirs: str, concurrency: int) -> float:
        pairs = zip(throughput[ours, concurrency], throughput[theirs, concurrency], strict=True)
        return median([one / other for one, other in pairs])

    best = "pmgaft-int8" if "pmgaft-int8" in names else "pmgaft-fp32"
    plain = [name for name in names if name.endswith("plain")]
    results.figure("serve.over_plain_min", min(over(best, name, c) for name in plain for c in CONCURRENCY if c >= 8))
    if "litserve-cached" in names:
        fp32 = min(over("pmgaft-fp32", "litserve-cached", c) for c in CONCURRENCY)
        results.figure("serve.over_litserve_cached_fp32_min", fp32)
        results.figure("serve.over_litserve_cached_best", min(over(best, "litserve-cached", c) for c in CONCURRENCY))


@contextmanager
def peer(script: str, model: str, *more: str, path: str = "/predict") -> Iterator[Target]:
    """One of peers/ in a process group of its own, once it answers."""
    port = free_ports(1)[0]
    command = [sys.executable, str(HERE / "peers" / script), model, *more]
    command += ["--port", str(port), "--threads", str(cores())]
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory(prefix="peer-") as scratch:
        environment = os.environ | {"TMPDIR": scratch, "OMP_NUM_THREADS": str(cores())}
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
        try:
            target = target_of(f"http://127.0.0.1:{port}", path)
            first = form_message(target, picture(64, 64), ["cat", "dog"])
            deadline = time.monotonic() + 600
            while not answered(target, first):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"{script} did not start:\n{log.read().decode()[-3000:]}")
                time.sleep(1)
            print(f"{script} is ready")
            yield target
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def answered(target: Target, message: bytes) -> bool:
    try:
        load = Load(target=target, message=lambda number: message, concurrency=1, seconds=120, requests=1, timeout=120)
        return run(load).statuses == {"200": 1}
    except ServerError:
        return False


def cold_part(results: Results, effort: Effort, bundles: Mapping[str, Bundle]) -> None:
    """New labels, by the served text encoder: cropped to the longest, and at the full context length."""
    count = 1000 if effort is FULL else 50
    for model, bundle in bundles.items():
        engine = open_engine(bundle, "onnx", CPU, cores())
        torch.set_num_threads(cores())
        cropped, full = (TextEncoder(bundle.tokenizer(), engine.text, causal) for causal in (True, False))
        cropped.encode(LABELS[:8]), full.encode(LABELS[:8])
        times: dict[str, list[float]] = {"cropped": [], "full": []}
        for start in range(0, count, 100):
            labels = [f"new {number}" for number in range(start, min(start + 100, count))]
            features = []
            for name, encoder in shuffled((("cropped", cropped), ("full", full))):
                begun = time.perf_counter()
                features.append(label_features(encoder.encode, labels))
                times[name].append(time.perf_counter() - begun)
            results.figure(f"text.cropped_largest_difference.{model}", float((features[0] - features[1]).abs().max()))
        results.figure(f"text.cold_seconds.{model}_cropped", sum(times["cropped"]))
        results.figure(f"text.cold_seconds.{model}_full", sum(times["full"]))
        results.figure(f"text.cold_labels_speedup.{model}", sum(times["full"]) / sum(times["cropped"]))
    last = list(bundles)[-1]
    results.figure("text.cold_labels_speedup", results.figures[f"text.cold_labels_speedup.{last}"])


def draft_part(results: Results, bundles: Mapping[str, Bundle]) -> None:
    """The answer to a photograph whose JPEG was scaled while it was decoded, against the exact one.

    And, so that one knows what that says, against what noise of the same size makes of it.
    """
    import skimage

    names = (HERE.parent / "pmgaft" / "data" / "imagenet-names.txt").read_text().splitlines()
    folder = Path(skimage.__file__).parent / "data"
    files = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "ihc", "motorcycle_left", "retina", "rocket")
    bundle = bundles["mini"]
    engine = open_engine(bundle, "onnx", CPU, cores())
    text = label_features(TextEncoder(bundle.tokenizer(), engine.text, True).encode, names)
    same, noisy_same, differences = [], [], []
    generator = torch.Generator().manual_seed(0)
    for name in files:
        photograph = Image.open(next(folder.glob(f"{name}.*"))).convert("RGB")
        for width in (600, 1200, 2400, 4000):
            large = photograph.resize((width, round(photograph.height * width / photograph.width)))
            noise = np.random.default_rng(width).normal(0, 6, (large.height, large.width, 3))
            noisy = Image.fromarray((np.asarray(large) + noise).clip(0, 255).astype(np.uint8))
            with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
                noisy.save(file.name, quality=90)
                content = Path(file.name).read_bytes()
            exact = to_pixels(open_image(content), bundle.preprocess)
            served = read_pixels(content, bundle.preprocess)
            moved = [exact + noise_like(served - exact, generator) for _ in range(NOISES)]
            answers = (engine.image(torch.stack([exact, served, *moved]).clamp(0, 1)) @ text.T).argmax(dim=1)
            same.append(float(answers[0] == answers[1]))
            noisy_same.append(float((answers[2:] == answers[0]).float().mean()))
            differences.append(255 * float((exact - served).abs().mean()))
    results.figure("draft.top1_agreement", statistics.mean(same))
    results.figure("draft.noise_top1_agreement", statistics.mean(noisy_same))
    results.figure("draft.worst_mean_grey_levels", max(differences))


def noise_like(difference: Tensor, generator: torch.Generator) -> Tensor:
    """The same sizes elsewhere, each up or down by chance."""
    shuffled_sizes = difference.abs().flatten()[torch.randperm(difference.numel(), generator=generator)]
    signs = torch.randint(0, 2, difference.shape, generator=generator) * 2 - 1
    return shuffled_sizes.view_as(difference) * signs


def full_part(results: Results, effort: Effort, bundles: Mapping[str, Bundle]) -> None:
    """Refusals of a full server: requests come at three times the rate that it answers, whatever it says."""
    image, refusals = picture(500, 375), []
    with serve(bundles["mini"], requests=FULL_AT) as (_, target):
        load = Load(
            target=target,
            message=messages(target, image, 10),
            concurrency=FULL_AT,
            seconds=effort.seconds,
            warmup=effort.warmup,
        )
        for _ in range(effort.rounds):
            most = results.report(run(load), part="full", asked="what it can").throughput
            over = replace(load, rate=3 * most, concurrency=1000)
            report = results.report(run(over), part="full", asked="three times that")
            print(f"    refused in {report.refusal_ms} ms, {report.statuses}", flush=True)
            refusals.append(report.refusal_ms["p95"])
    results.figure("ops.refusal_p95_ms", median(refusals))


def memory_part(results: Results, effort: Effort, bundle: Bundle) -> None:
    """Growth of the worker and of the front end over many requests of all kinds, after a tenth of them."""
    chance = random.Random(0)
    pictures = [picture(*size) for size in ((64, 64), (500, 375), (1200, 900), (2000, 1500))]

    def sizes(server: Server) -> dict[str, float]:
        front = psutil.Process(server._process.pid)
        return {
            "front_mb": front.memory_info().rss / 2**20,
            "workers_mb": sum(psutil.Process(pid).memory_info().rss for pid in server.workers()) / 2**20,
        }

    with serve(bundle) as (server, target):
        pool = [
            form_message(
                target,
                chance.choice(pictures),
                chance.sample(LABELS, chance.choice((1, 2, 10, 100, 1000))),
                templates=chance.choice(("simple", "a photo of a {}.", "{}")),
            )
            for _ in range(400)
        ]
        load = Load(target=target, message=rotating(pool), concurrency=16, seconds=36_000, requests=0, timeout=600)
        warm = effort.memory_requests // 10
        results.report(run(replace(load, requests=warm)), part="memory", phase="warm-up")
        before = sizes(server)
        results.report(run(replace(load, requests=effort.memory_requests)), part="memory", phase="measured")
        after = sizes(server)
    results.tables["memory"] = {"requests": effort.memory_requests, "before": before, "after": after}
    for name in before:
        results.figure(f"serve.memory_growth_{name}", after[name] - before[name])
    results.figure("serve.memory_growth_mb", max(after[name] - before[name] for name in before))


# everything


def shuffled(things: Sequence[Any]) -> list[Any]:
    """In another order each time: nobody always runs after the same neighbour."""
    return random.sample(list(things), len(things))


PARTS = ("ceiling", "labels", "photos", "peers", "cold", "draft", "full", "memory")
OF_MINI = {"draft", "full", "memory"}


@click.command()
@click.option("--quick", is_flag=True, help="A smoke test: mini alone, a second each, nothing written.")
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), default=PARTS, help="[default: all]")
@click.option("--parity-data", help="Labelled pictures on which int8's cost is measured, as for `pmgaft export`.")
@click.option("--table", "only_table", is_flag=True, help="Measure nothing; write the tables of docs/serving.md.")
@click.option("--output", default=RESULTS / "serve.json", type=click.Path(path_type=Path))
def main(quick: bool, parts: tuple[str, ...], parity_data: str | None, only_table: bool, output: Path) -> None:
    if only_table:
        write_tables(json.loads(output.read_text()))
        return
    effort, results, before = QUICK if quick else FULL, Results(), machine(PACKAGES)
    with tempfile.TemporaryDirectory(prefix="pmgaft-bench-") as directory:
        scratch = Path(directory)
        needed = effort.models if set(parts) - OF_MINI else ("mini",)
        models = {name: random_vit(scratch) if name == "vit_b32" else name for name in needed}
        bundles = {
            name: export(model, scratch / f"bundle-{name}", parity_data if name == "mini" else None)
            for name, model in models.items()
        }
        for name, bundle in bundles.items():
            for form, entry in bundle.manifest.formats.items():
                results.tables.setdefault("parity", {})[f"{name} {form}"] = entry.parity.model_dump()
                if form == "onnx-int8":
                    results.figure(f"serve.lowest_cosine.{name}_int8", entry.parity.cosine)
        measure: dict[str, Callable[[], None]] = {
            "ceiling": lambda: ceiling_part(results, effort, bundles),
            "labels": lambda: labels_part(results, effort, bundles),
            "photos": lambda: photos_part(results, effort, bundles),
            "peers": lambda: peers_part(results, effort, bundles["vit_b32"], models["vit_b32"]),
            "cold": lambda: cold_part(results, effort, bundles),
            "draft": lambda: draft_part(results, bundles),
            "full": lambda: full_part(results, effort, bundles),
            "memory": lambda: memory_part(results, effort, bundles["mini"]),
        }
        for part in PARTS:
            if part in parts and not (quick and part == "peers"):
                print(f"--- {part}", flush=True)
                measure[part]()
    if not quick:
        write(output, results, before, effort, parts)


def write(output: Path, results: Results, before: dict[str, Any], effort: Effort, parts: Sequence[str]) -> None:
    """The whole into `output`, parts that were not measured now as they were; the figures into summary.json too."""
    known = json.loads(output.read_text()) if output.exists() else {"figures": {}, "reports": [], "tables": {}}
    kept = [report for report in known["reports"] if report["part"] not in parts]
    content = {
        "machine": before,
        "effort": asdict(effort),
        "figures": dict(sorted((known["figures"] | results.figures).items())),
        "tables": known["tables"] | results.tables,
        "reports": kept + results.reports,
    }
    output.write_text(json.dumps(content, indent=1) + "\n")
    summarise(results.figures)
    write_tables(content)
    print(f"wrote {output}")


def write_tables(content: Mapping[str, Any]) -> None:
    """The part between the markers of docs/serving.md."""
    text = GUIDE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    GUIDE.write_text(f"{before}{BEGIN}\n{tables(content)}\n{END}{after}")


def tables(content: Mapping[str, Any]) -> str:
    """Markdown: medians over rounds."""
    figures, where = content["figures"], content["machine"]
    versions = ", ".join(f"{name} {one}" for name, one in where["versions"].items())
    about = f"{where['processor']}, {where['cores']} cores, {where['memory_gb']} GB; {versions}"
    parts = [f"{about}. Load average at the start: {where['load_average'][0]:.1f}."]
    rows: list[tuple[str, ...]] = [
        (
            name,
            f"{figures[f'ceiling.images_per_second.{name}']:.1f}",
            f"{figures[f'serve.requests_per_second.{name}_c32']:.1f}",
            f"{figures[f'serve.http_over_ceiling.{name}_c32']:.0%}",
            f"{figures[f'ceiling_lanes.images_per_second.{name}']:.1f}",
            f"{figures[f'serve.http_over_lanes.{name}_c32']:.0%}",
            f"{figures[f'serve.lone_request_added_ms.{name}']:.1f}",
        )
        for name in sorted(name.rpartition(".")[2] for name in figures if name.startswith("ceiling."))
    ]
    heads: tuple[str, ...] = (
        "model and engine",
        "encoder alone, images/s",
        "HTTP at 32, requests/s",
        "share",
        "two lanes alone, images/s",
        "share",
        "lone request adds, ms",
    )
    parts.append(markdown(heads, rows))
    spent = content["tables"].get("processor_ms", {})
    columns = list(next(iter(spent.values()), {}))
    rows = [(name, *(f"{costs[column]:.2f}" for column in columns)) for name, costs in sorted(spent.items())]
    heads = ("processor ms a request, at 32", *(f"{one} alone" if one in ALONE else one for one in columns))
    parts.append(markdown(heads, rows))
    for part, keys in {"labels": ("model", "labels"), "photos": ("model", "jpeg"), "peers": ("server",)}.items():
        reports = [report for report in content["reports"] if report["part"] == part]
        groups = sorted({tuple(report[key] for key in (*keys, "concurrency")) for report in reports})
        rows = []
        for group in groups:
            mine = [one for one in reports if tuple(one[key] for key in (*keys, "concurrency")) == group]
            figures_of = [median([one["throughput"] for one in mine])]
            figures_of += [median([one["latency_ms"][name] for one in mine]) for name in ("p50", "p95", "p99")]
            rows.append((*map(str, group), *(f"{value:.1f}" for value in figures_of)))
        parts.append(markdown((*keys, "at once", "requests/s", "p50 ms", "p95 ms", "p99 ms"), rows))
    named = {name: value for name, value in figures.items() if name.count(".") == 1}
    parts.append(markdown(("figure", ""), [(f"`{name}`", f"{value:g}") for name, value in named.items()]))
    return "\n\n".join(part for part in parts if part)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; nothing where there are no rows."""
    if not rows:
        return ""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    main()
