"""What the dearest requests cost the server, against the cheapest: processor seconds and memory.

python benchmarks/amplification.py [--model mini] [--quick]

Nobody here may probe. Each kind of request is sent alone to a `pmgaft serve` with default limits, one worker and one
thread; its cost is the processor time that TorchServe and the worker took from before it until all was answered, and
the largest resident size of both while it was in work (Linux' VmHWM, set back before each). The cheapest request that
is answered with 200 is a picture of 8 x 8 pixels and one known label. Kinds that are refused are here, too: a refusal
must not be dear.

Writes results/amplification.json, and into results/summary.json ops.amplification_cpu (the dearest kind's processor
seconds over the cheapest's) and ops.amplification_memory (the largest resident size, of both processes, over the one
that the cheapest sees).
"""

from __future__ import annotations

import io
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
from PIL import Image, ImageFile
from record import RESULTS, machine, summarise

from pmgaft_export.bundle import open_bundle
from pmgaft_export.shipped import bundle_for
from pmgaft_serve.probing import ProbePolicy
from pmgaft_serve.protocol import PATH, Limits
from pmgaft_serve.service import Settings
from pmgaft_serve.torchserve import ServeOptions, Server, serving

LIMITS = Limits()
KNOWN = "cat"
LONG = "x y x y x y x y"
"""With a number, a turn and the usual template as many tokens as a thousand of them may have."""
CHEAP_REQUESTS = 200
REPEATS = 3

Form = tuple[list[tuple[str, bytes]], dict[str, str]]
"""Image files by field name, and the other fields."""


def picture(width: int, height: int, kind: str, *, noise: bool, **options: Any) -> bytes:
    """An encoded picture: smooth, or noise that no codec makes small."""
    generator = np.random.default_rng(0)
    if noise:
        pixels = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    else:
        seed = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        pixels = seed.resize((width, height), Image.Resampling.BILINEAR)
    content, ImageFile.MAXBLOCK = io.BytesIO(), 2**27  # room for a progressive JPEG of noise
    pixels.save(content, kind, **options)
    return content.getvalue()


def kinds() -> dict[str, Callable[[int], Form]]:
    """Name -> the request, given a number that makes its texts new."""
    most, decoded = LIMITS.image.pixels, LIMITS.image.decoded
    side, largest, progressive = int(decoded**0.5), int(most**0.5), int((2 * decoded) ** 0.5)
    labels = LIMITS.labels
    jpeg = {"quality": 95, "subsampling": 0, "progressive": True}
    pictures = {
        "largest PNG": picture(side, side, "PNG", noise=False),
        "largest JPEG": picture(largest, largest, "JPEG", noise=False, quality=95, subsampling=0),
        "largest JPEG, progressive": picture(progressive, progressive, "JPEG", noise=False, **jpeg),
        "most bytes of JPEG, progressive": picture(2480, 2480, "JPEG", noise=True, **jpeg),
        "most bytes of PNG": picture(2040, 2040, "PNG", noise=True),
        "largest WebP": picture(16383, decoded // 16383, "WEBP", noise=False, quality=50),
        "most bytes of WebP, lossless": picture(2040, 2040, "WEBP", noise=True, lossless=True, quality=0),
        "most bytes of BMP": picture(2040, 2040, "BMP", noise=False),
        "largest GIF": picture(side, side, "GIF", noise=False),
        "most bytes of TIFF, LZW": picture(1700, 1700, "TIFF", noise=False, compression="tiff_lzw"),
    }
    found: dict[str, Callable[[int], Form]] = {
        f"{name}, {len(content) / 2**20:.1f} MB": lambda _, content=content: one(content)
        for name, content in pictures.items()
    }
    noisy = picture(1750, 1750, "JPEG", noise=True, **jpeg)
    copies = LIMITS.request_bytes // (len(noisy) + 1000)
    found[f"{copies} JPEGs, progressive, of {len(noisy) / 2**20:.1f} MB"] = lambda _: several(noisy, copies)
    quarter = picture(side // 2, side // 2, "PNG", noise=False)
    found["4 PNGs of a quarter of the pixels"] = lambda _: several(quarter, 4)
    found["8 PNGs of a quarter of the pixels (refused)"] = lambda _: several(quarter, 8)
    small = picture(8, 8, "PNG", noise=True)
    half = picture(side, side // 2, "PNG", noise=False)
    photo = picture(4000, 3000, "JPEG", noise=False, quality=90)
    found |= {
        "4 photographs of 12 megapixels": lambda _: several(photo, 4),
        "1,000 new labels of the most tokens": lambda turn: asking(small, new(labels, turn, LONG), None),
        "1,000 new labels of the most tokens, the largest JPEG (refused)": lambda turn: asking(
            pictures["largest JPEG, progressive"], new(labels, turn, LONG), None, lint="true"
        ),
        "as many new tokens as the largest JPEG leaves, lint": lambda turn: asking(
            pictures["largest JPEG, progressive"], new(beside(decoded), turn, LONG), None, lint="true"
        ),
        "as many new tokens as half the pixels leave, lint": lambda turn: asking(
            half, new(beside(decoded // 2), turn, LONG), None, lint="true"
        ),
        "1,000 new labels, 2 templates (refused)": lambda turn: asking(small, new(labels, turn, "thing"), templates(2)),
        "1,000 new labels, 100 templates (refused)": lambda turn: asking(
            small, new(labels, turn, "thing"), templates(100)
        ),
        "1,000 new labels, lint": lambda turn: asking(small, new(labels, turn, "lint"), None, lint="true"),
        "1,001 labels (refused)": lambda turn: asking(small, new(labels + 1, turn, "many"), None),
        "as many bytes of nothing as an image may have (refused)": lambda _: one(bytes(LIMITS.image.bytes)),
    }
    return found


def beside(pixels: int) -> int:
    """How many new labels of the most tokens may be in a request with so many pixels to decode."""
    return LIMITS.labels * LIMITS.tokens_beside(pixels) // LIMITS.tokens


def one(content: bytes) -> Form:
    return [("image", content)], {"labels": KNOWN}


def several(content: bytes, copies: int) -> Form:
    return [(f"image.{number}", content) for number in range(copies)], {"labels": KNOWN}


def new(count: int, turn: int, text: str) -> list[str]:
    """Labels that the server has not seen, within its limit of characters."""
    most = LIMITS.label_characters
    return [f"{number} {turn} {text}"[:most] for number in range(count)]


def templates(count: int) -> list[str]:
    return [f"a photo {number} of a {{}}." for number in range(count)]


def asking(content: bytes, labels: list[str], prompts: list[str] | None, **more: str) -> Form:
    fields = {"labels": json.dumps(labels)} | more
    return [("image", content)], fields | ({"templates": json.dumps(prompts)} if prompts else {})


class Watch:
    """What the server's processes used."""

    def __init__(self, server: Server) -> None:
        self.processes = list(server.processes().values())

    def seconds(self) -> float:
        """Processor seconds so far, to the microsecond where the kernel tells them."""
        return sum(
            int((task / "schedstat").read_text().split()[0]) / 1e9
            for process in self.processes
            for task in Path(f"/proc/{process}/task").iterdir()
        )

    def forget_peak(self) -> None:
        for process in self.processes:
            Path(f"/proc/{process}/clear_refs").write_text("5")

    def peak(self) -> int:
        """Bytes that all processes together held at their largest since `forget_peak`."""
        lines = [line for p in self.processes for line in Path(f"/proc/{p}/status").read_text().splitlines()]
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def ask(client: httpx.Client, url: str, form: Form) -> int:
    files, fields = form
    answer = client.post(url, files=[(name, ("x", content)) for name, content in files], data=fields)
    return answer.status_code


def measure(watch: Watch, work: Callable[[], int], repeats: int) -> dict[str, Any]:
    """Of one request: the median of processor seconds, and the largest peak."""
    seconds, peaks, status = [], [], 0
    for _ in range(repeats):
        watch.forget_peak()
        before = watch.seconds()
        status = work()
        seconds.append(watch.seconds() - before)
        peaks.append(watch.peak())
    return {"status": status, "cpu_seconds": statistics.median(seconds), "peak_bytes": max(peaks)}


@click.command()
@click.option("--model", default="mini", show_default=True)
@click.option("--quick", is_flag=True, help="Each once; nothing is kept.")
def main(model: str, quick: bool) -> None:
    """Measure, print, write JSON."""
    bundle = open_bundle(bundle_for(model))
    settings = Settings(threads=1, decoders=1, probe=ProbePolicy(allow="off"))
    requests = kinds()
    with (
        serving(ServeOptions(bundle=bundle.directory, port=0, settings=settings)) as server,
        httpx.Client(timeout=300, trust_env=False) as client,
    ):
        url, watch = server.url + PATH, Watch(server)
        cheapest = one(picture(8, 8, "PNG", noise=True))

        def cheap() -> int:
            return max(ask(client, url, cheapest) for _ in range(CHEAP_REQUESTS))

        cheap()
        cheap_cost = measure(watch, cheap, REPEATS)
        cheap_cost["cpu_seconds"] /= CHEAP_REQUESTS
        found = {"cheapest": cheap_cost}
        show("cheapest", cheap_cost, cheap_cost)
        turns = itertools.count()  # so that no kind's texts are another's
        for name, make in requests.items():
            forms = iter([make(next(turns)) for _ in range(1 if quick else REPEATS)])
            cost = measure(watch, lambda forms=forms: ask(client, url, next(forms)), 1 if quick else REPEATS)
            found[name] = cost
            show(name, cost, cheap_cost)
    figures = {
        f"ops.amplification_{name}": round(max(cost[key] for cost in found.values()) / cheap_cost[key], 2)
        for name, key in (("cpu", "cpu_seconds"), ("memory", "peak_bytes"))
    }
    click.echo(json.dumps(figures, indent=1))
    if quick:
        return
    content = {"model": model, "machine": machine(), "figures": figures, "requests": found}
    (RESULTS / "amplification.json").write_text(json.dumps(content, indent=1) + "\n")
    summarise(figures)


def show(name: str, cost: dict[str, Any], cheapest: dict[str, Any]) -> None:
    ratio = cost["cpu_seconds"] / cheapest["cpu_seconds"]
    megabytes = cost["peak_bytes"] / 2**20
    click.echo(
        f"{name:55} {cost['status']}  {1000 * cost['cpu_seconds']:9.1f} ms of processor, {ratio:7.1f} x the cheapest,"
        f" {megabytes:7.0f} MB at most"
    )


if __name__ == "__main__":
    main()
