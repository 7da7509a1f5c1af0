"""`pmgaft serve` and `pmgaft classify`. Imports click alone at the top: `--help` answers at once."""

from __future__ import annotations

import base64
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from pmgaft.gate import exit_code, fail_on_option

from .probe_options import classify_options, probe_fields, probe_policy, sample_policy, serve_options

if TYPE_CHECKING:
    import torch

    from .client import Client, Question
    from .label_sets import LabelSet
    from .protocol import Answer, Limits
    from .request_log import LogFormat
    from .torchserve import ServeOptions, Server

# as in engines.CHOICES, which cannot be imported as quickly as help should come
ENGINES = (
    "auto", "torchscript", "onnxruntime", "tensorrt", "aotinductor",
    "torchscript-fp16", "onnx", "onnx-fp16", "onnx-int8", "pt2", "pt2-fp16",
)  # fmt: skip


FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(short_help="Serve a bundle or a shipped model over HTTP.")
@click.argument("bundle_or_name")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need --token.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
@click.option("--metrics-port", type=click.IntRange(0, 65535), help="/metrics, /healthz, /readyz [default: --port + 2]")
@click.option("--grpc-port", type=click.IntRange(1, 65535), help="TorchServe's gRPC [default: a free one, on loopback]")
@click.option(
    "--workers", type=click.IntRange(1, 64), help="Processes with a model each [default: one for each GPU, else 1]"
)
@click.option("--threads", type=click.IntRange(1), help="Of each worker's encoder [default: cores / workers]")
@click.option("--decoders", type=click.IntRange(1), help="Threads of each worker that decode [default: as --threads]")
@click.option(
    "--batch",
    default=32,
    show_default=True,
    type=click.IntRange(1, 1024),
    help="Images encoded at once, in all batches.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--engine", default="auto", show_default=True, type=click.Choice(ENGINES), metavar="NAME",
    help="auto, an engine (torchscript, onnxruntime, tensorrt, aotinductor), or a format of the bundle (onnx-int8 ..).",
)  # fmt: skip
@click.option("--token", envvar="PMGAFT_TOKEN", help="Ask clients for this token; better given as PMGAFT_TOKEN.")
@click.option("--token-file", type=FILE, help="The same from a file of one line.")
@click.option("--tls-certificate", type=FILE, help="For HTTPS: a PEM file, with the certificates up to the root's.")
@click.option("--tls-key", type=FILE, help="For HTTPS: its key, PEM in PKCS #8 form.")
@click.option("--cors-origin", metavar="ORIGIN", help='Whose pages may read answers in a browser; "*": anybody\'s.')
@serve_options
@click.option("--max-requests", default=64, show_default=True, type=click.IntRange(1), help="In work; others get 503.")
@click.option(
    "--limit", "limits", multiple=True, metavar="NAME=VALUE", help="Of one request, such as labels=5000 (see below)."
)
@click.option("--label-set", "label_sets", multiple=True, metavar="NAME=FILE", help='Labels to ask for as "@NAME".')
@click.option(
    "--warm-labels",
    multiple=True,
    type=FILE,
    help="A file of labels to encode before the first request.",
)
@click.option("--label-cache", default=256, show_default=True, type=click.IntRange(1), help="For labels: megabytes.")
@click.option(
    "--log-format",
    default="text",
    show_default=True,
    type=click.Choice(["none", "text", "json"]),
    help="One line a request on stdout.",
)
@click.option(
    "--start-seconds", default=180.0, show_default=True, type=click.FloatRange(1), help="Until a worker must be ready."
)
@click.option(
    "--receive-seconds", default=60, show_default=True, type=click.IntRange(1), help="For a request to arrive whole."
)
@click.option(
    "--drain-seconds",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0),
    help="For requests in work at the end.",
)
def serve(
    bundle_or_name: str,
    host: str,
    port: int,
    metrics_port: int | None,
    grpc_port: int | None,
    workers: int | None,
    threads: int | None,
    decoders: int | None,
    batch: int,
    device: str,
    engine: str,
    token: str | None,
    token_file: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    cors_origin: str | None,
    max_requests: int,
    limits: tuple[str, ...],
    label_sets: tuple[str, ...],
    warm_labels: tuple[Path, ...],
    label_cache: int,
    log_format: str,
    start_seconds: float,
    receive_seconds: int,
    drain_seconds: float,
    **probing: Any,
) -> None:
    """Serve BUNDLE_OR_NAME over HTTP until Ctrl-C: a bundle's directory, a run, `mini` or `mini-robust`.

    Limits on probes and requests are each worker's. A file of labels has one a line, or is a JSON list, or a JSON
    object with "labels" and "templates" (a list, or the name of a standard set such as "imagenet").

    \b
    Names for --limit, with their defaults:
      request_bytes 16777216, answer_bytes 8388608, image_bytes 12582912,
      image_pixels 50000000, decoded_pixels 16777216 (of all images; a third of
      a JPEG that is scaled while decoded, half of a progressive one), images 16, labels 1000,
      label_characters 300, templates 100, texts 10000 (labels times templates
      not seen before), tokens 20480 (those times the longest one's; large
      images leave fewer);
      of a probe: probe_images 16, probe_labels 1000, steps 200, restarts 10,
      targets 10, square 500, draws 1000

    \b
    Example:
      pmgaft serve mini-robust
      pmgaft serve mini-robust --port 0 --workers 2 --engine onnxruntime
      pmgaft serve mini --label-set pets=pets.txt --limit labels=5000
    """
    from pmgaft.console import note, step
    from pmgaft.device import pick_device
    from pmgaft.errors import InputError
    from pmgaft_export.bundle import open_bundle
    from pmgaft_export.shipped import bundle_for

    from .credentials import read_tls, read_token
    from .label_sets import read_label_set
    from .service import Settings
    from .torchserve import ServeOptions, is_loopback

    token = read_token("token", token, token_file)
    tls = read_tls(tls_certificate, tls_key)
    if not is_loopback(host) and not token:
        message = f"{host} can be reached from other machines; give a --token that clients must send"
        raise InputError(message, field="host", code="token_missing")
    processes = workers or _gpus(pick_device(device), device)
    cores = max(1, _cores() // processes)
    limited = _limits(limits)
    sets = _label_sets(label_sets, limited.label_characters)
    warm = tuple(read_label_set(path, longest=limited.label_characters) for path in warm_labels)
    with step(f"opening {bundle_or_name}"):
        bundle = open_bundle(bundle_for(bundle_or_name, note))
    settings = Settings(
        limits=limited,
        token=token,
        requests=max_requests,
        batch=batch,
        threads=threads or cores,
        decoders=decoders or threads or cores,
        cache_bytes=label_cache * 2**20,
        probe=probe_policy(probing, loopback=is_loopback(host), workers=processes),
        sample=sample_policy(probing),
    )
    options = ServeOptions(
        bundle=bundle.directory,
        host=host,
        port=port,
        metrics_port=metrics_port,
        grpc_port=grpc_port,
        workers=processes,
        device=device,
        engine=engine,
        settings=settings,
        sets=sets,
        warm=warm,
        tls=tls,
        cors_origin=cors_origin,
        log=cast("LogFormat", log_format),
        start_seconds=start_seconds,
        receive_seconds=receive_seconds,
        drain_seconds=drain_seconds,
    )
    _serve(options, bundle.manifest.name)


def _cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus(device: torch.device, asked: str) -> int:
    """Workers where none were asked for: one for each GPU that is to be used, one where none is."""
    import torch

    return torch.cuda.device_count() if device.type == "cuda" and ":" not in asked else 1


def _limits(texts: tuple[str, ...]) -> Limits:
    """What NAME=VALUE texts change about the defaults."""
    from dataclasses import fields, replace

    from pmgaft.errors import InputError, quote

    from .protocol import Limits

    image = {"image_bytes": "bytes", "image_pixels": "pixels", "decoded_pixels": "decoded"}
    names = [*(one.name for one in fields(Limits) if one.name != "image"), *image]
    changes: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in names or not value.isdecimal() or not int(value):
            message = f"{quote(text)} is no limit; write NAME=VALUE with a whole number, NAME one of {', '.join(names)}"
            raise InputError(message, field="limit", code="limit_invalid")
        changes[name] = int(value)
    images = replace(Limits().image, **{image[name]: value for name, value in changes.items() if name in image})
    return replace(Limits(image=images), **{name: value for name, value in changes.items() if name not in image})


def _label_sets(texts: tuple[str, ...], longest: int) -> tuple[LabelSet, ...]:
    """The sets of NAME=FILE texts."""
    from pmgaft.errors import InputError

    from .label_sets import named_label_set

    sets = [named_label_set(text, longest=longest) for text in texts]
    names = [one.name for one in sets]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"the label set {name} is given twice", field="label_set", code="label_set_invalid")
    return tuple(sets)


def _serve(options: ServeOptions, name: str) -> None:
    """Run until a signal or TorchServe's own end."""
    import signal
    import threading

    from pmgaft.console import note
    from pmgaft.errors import ServerError

    from .torchserve import serving

    started, stop, hurry = threading.Event(), threading.Event(), threading.Event()

    def on_signal(number: int, frame: object) -> None:
        if hurry.is_set():
            return  # everything is being ended already; let it finish
        if stop.is_set() or not started.is_set():  # a second time, or nobody is served yet: do not wait
            hurry.set()
            raise KeyboardInterrupt
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    with serving(options, note) as server:
        started.set()
        _banner(server, name)
        while not stop.wait(0.5):
            if not server.alive():
                raise ServerError(f"TorchServe ended by itself; its log is {server.log}", code="stopped")
        note("stopping: finishing the requests in work (again Ctrl-C: stop at once)")
    note("stopped")


def _banner(server: Server, name: str) -> None:
    from .client import DEFAULT_URL

    if server.options.log == "json":
        from .request_log import event_line

        content = {"event": "ready", "model": name, "engine": server.engine, "url": server.url, "grpc": server.grpc}
        content |= {"metrics": server.metrics_url, "log": str(server.log)}
        click.echo(event_line("info", content))
        sys.stdout.flush()
        return
    where = "" if server.url == DEFAULT_URL else f" --url {server.url}"
    token = " --token TOKEN" if server.options.settings.token else ""
    workers = server.options.workers
    grpc = f"  grpc      {server.grpc}\n" if server.options.grpc_port else ""
    click.echo(
        f"{name} is ready at {server.url} ({server.engine}, {workers} worker{'s' * (workers > 1)})\n"
        f"  metrics   {server.metrics_url}/metrics (there too: /healthz /readyz /openapi.json)\n"
        f"  log       {server.log}\n"
        f"{grpc}"
        f"  try       pmgaft classify cat.jpg --labels cat,dog,toaster{where}{token}\n"
        f"  stop      Ctrl-C"
    )
    sys.stdout.flush()


@click.command(short_help="Ask a running server about pictures.")
@click.argument("images", nargs=-1, required=True, type=FILE)
@click.option("--labels", multiple=True, help="What it might be, separated by commas; or a set's @NAME.")
@click.option("--label-file", type=FILE, help="A file with a label a line.")
@click.option("--template", multiple=True, help='Prompt with one "{}" for the label; several are averaged.')
@click.option("--templates", help='A standard set of prompts by name, such as "imagenet".')
@click.option("--top-k", type=click.IntRange(1), help="Show only the most probable labels.")
@classify_options
@click.option("--url", default="http://127.0.0.1:8080", show_default=True, envvar="PMGAFT_URL", help="The server.")
@click.option("--token", envvar="PMGAFT_TOKEN", help="What the server asks for; better given as PMGAFT_TOKEN.")
@click.option("--json", "as_json", is_flag=True, help="The server's answers as they are, one line an image.")
@fail_on_option
def classify(
    images: tuple[Path, ...],
    labels: tuple[str, ...],
    label_file: Path | None,
    template: tuple[str, ...],
    templates: str | None,
    top_k: int | None,
    url: str,
    token: str | None,
    as_json: bool,
    fail_on: tuple[str, ...],
    **probing: Any,
) -> int:
    """Rank labels for IMAGES by a running server, and on request attack its answers.

    \b
    Exit codes: 0 answered; 1 the server failed or is not there; 2 the request is wrong;
    3 a probe broke an answer (with --fail-on broken); 4 nothing can be said of one (with --fail-on inconclusive).

    \b
    Example:
      pmgaft classify cat.jpg --labels cat,dog,toaster
      pmgaft classify cat.jpg --labels cat,dog,toaster --probe --eps 1/255 --fail-on broken
      pmgaft classify cat.jpg --labels cat,lion,dog --probe --min-eps --targets 2 --health
    """
    from .client import Client, Question

    if fail_on and not probing["probe"]:
        raise click.UsageError("--fail-on needs --probe")
    if template and templates:
        raise click.UsageError("give either --template or --templates")
    question = Question(
        labels=label_list(labels, label_file),
        templates=templates or template or None,
        top_k=top_k,
        probe=probe_fields(probing),
    )
    saved = probing["save_adversarial"]
    if saved is not None and len(images) > 1:
        raise click.UsageError("--save-adversarial takes one image")
    with Client(url, token) as client:
        return _ask(client, images, question, as_json, saved, fail_on)


def _ask(
    client: Client,
    images: tuple[Path, ...],
    question: Question,
    as_json: bool,
    saved: Path | None,
    fail_on: tuple[str, ...],
) -> int:
    """Ask about each image; one that fails does not keep the others from being answered."""
    from pmgaft.console import note, step
    from pmgaft.errors import ImageError

    from .client import RefusedError

    failed, verdicts = 0, set()
    for image in images:
        try:
            with step(f"probing {image.name}") if question.probe else nullcontext():
                answer = client.classify(image, question)
        except (RefusedError, ImageError) as error:
            if len(images) == 1:
                raise
            note(f"{image}: {error.message}")
            failed = failed or error.exit_code
            continue
        if saved is not None and answer.probe is not None and answer.probe.image is not None:
            saved.write_bytes(base64.b64decode(answer.probe.image.png_base64))
        _show(image, answer, as_json)
        if answer.probe is not None:
            verdicts.add(answer.probe.verdict)
    return failed or exit_code(verdicts, fail_on)


def _show(image: Path, answer: Answer, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"image": str(image)} | answer.model_dump(exclude_none=True), ensure_ascii=False))
        return
    from rich.console import Console

    from .display import show

    show(Console(highlight=False), str(image), answer)


def label_list(labels: tuple[str, ...], label_file: Path | None) -> list[str] | str:
    """All labels of the command line, then those of the file; or the "@NAME" of a set that the server knows."""
    from .label_sets import MARK, read_label_set

    listed = [label.strip() for text in labels for label in text.split(",")]
    if label_file is None and len(listed) == 1 and listed[0].startswith(MARK):
        return listed[0]
    if label_file is not None:
        listed += read_label_set(label_file).labels
    if not listed:
        raise click.UsageError("give --labels cat,dog,toaster or --label-file FILE")
    return listed
