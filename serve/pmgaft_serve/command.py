"""`pmgaft serve` and `pmgaft classify`. Imports click alone at the top: `--help` answers at once."""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from .client import Client, Question
    from .protocol import Answer
    from .torchserve import ServeOptions, Server

EXIT_BROKEN = 3


@click.command(short_help="Serve a bundle or a shipped model over HTTP.")
@click.argument("bundle_or_name")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need --token.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
@click.option("--metrics-port", type=click.IntRange(0, 65535), help="/metrics, /healthz, /readyz [default: --port + 2]")
@click.option(
    "--workers", default=1, show_default=True, type=click.IntRange(1, 64), help="Processes with a model each."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--engine", default="auto", show_default=True, type=click.Choice(["auto", "torchscript", "onnxruntime"]))
@click.option("--token", envvar="PMGAFT_TOKEN", help="Ask clients for this token; better given as PMGAFT_TOKEN.")
@click.option("--probes", default=1, show_default=True, type=click.IntRange(0, 64), help="Probes at once; 0: none.")
@click.option(
    "--probe-seconds", default=30.0, show_default=True, type=click.FloatRange(0.1), help="Most for one probe."
)
@click.option("--max-requests", default=64, show_default=True, type=click.IntRange(1), help="In work; others get 503.")
def serve(
    bundle_or_name: str,
    host: str,
    port: int,
    metrics_port: int | None,
    workers: int,
    device: str,
    engine: str,
    token: str | None,
    probes: int,
    probe_seconds: float,
    max_requests: int,
) -> None:
    """Serve BUNDLE_OR_NAME over HTTP until Ctrl-C: a bundle's directory, a run, `mini` or `mini-robust`.

    Limits on probes and requests are each worker's.

    \b
    Example:
      pmgaft serve mini-robust
      pmgaft serve mini-robust --port 0 --workers 2 --engine onnxruntime
    """
    from pmgaft.console import note, step
    from pmgaft.device import pick_device
    from pmgaft.errors import InputError
    from pmgaft_export.bundle import open_bundle
    from pmgaft_export.shipped import bundle_for

    from .service import Settings
    from .torchserve import ServeOptions, is_loopback

    if not is_loopback(host) and not token:
        message = f"{host} can be reached from other machines; give a --token that clients must send"
        raise InputError(message, field="host", code="token_missing")
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token and token):
        raise InputError("a token is one or more printable ASCII characters", field="token", code="token_invalid")
    pick_device(device)
    with step(f"opening {bundle_or_name}"):
        bundle = open_bundle(bundle_for(bundle_or_name, note))
    settings = Settings(
        token=token,
        requests=max_requests,
        threads=max(1, _cores() // workers),
        probes=probes,
        probe_seconds=probe_seconds,
    )
    options = ServeOptions(
        bundle=bundle.directory,
        host=host,
        port=port,
        metrics_port=metrics_port,
        workers=workers,
        device=device,
        engine=engine,
        settings=settings,
    )
    _serve(options, bundle.manifest.name)


def _cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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

    where = "" if server.url == DEFAULT_URL else f" --url {server.url}"
    token = " --token TOKEN" if server.options.settings.token else ""
    workers = server.options.workers
    click.echo(
        f"{name} is ready at {server.url} ({server.engine}, {workers} worker{'s' * (workers > 1)})\n"
        f"  metrics   {server.metrics_url}/metrics (there too: /healthz /readyz /openapi.json)\n"
        f"  log       {server.log}\n"
        f"  try       pmgaft classify cat.jpg --labels cat,dog,toaster{where}{token}\n"
        f"  stop      Ctrl-C"
    )
    sys.stdout.flush()


@click.command(short_help="Ask a running server about pictures.")
@click.argument("images", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--labels", multiple=True, help="What it might be, separated by commas; may be given several times.")
@click.option(
    "--label-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A file with a label a line."
)
@click.option("--template", multiple=True, help='Prompt with one "{}" for the label; several are averaged.')
@click.option("--top-k", type=click.IntRange(1), help="Show only the most probable labels.")
@click.option("--probe", is_flag=True, help="Attack each answer, and say whether it broke.")
@click.option("--eps", default="1/255", show_default=True, help="With --probe: largest change of a pixel (linf).")
@click.option("--steps", default=20, show_default=True, type=click.IntRange(1), help="With --probe: gradient steps.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="With --probe: of the random start.")
@click.option("--url", default="http://127.0.0.1:8080", show_default=True, envvar="PMGAFT_URL", help="The server.")
@click.option("--token", envvar="PMGAFT_TOKEN", help="What the server asks for; better given as PMGAFT_TOKEN.")
@click.option("--json", "as_json", is_flag=True, help="The server's answers as they are, one line an image.")
@click.option("--fail-on-broken", is_flag=True, help=f"Exit with {EXIT_BROKEN} if a probe broke an answer.")
def classify(
    images: tuple[Path, ...],
    labels: tuple[str, ...],
    label_file: Path | None,
    template: tuple[str, ...],
    top_k: int | None,
    probe: bool,
    eps: str,
    steps: int,
    seed: int,
    url: str,
    token: str | None,
    as_json: bool,
    fail_on_broken: bool,
) -> int:
    """Rank labels for IMAGES by a running server, and on request attack its answers.

    \b
    Exit codes: 0 answered; 1 the server failed or is not there; 2 the request is wrong;
    3 a probe broke an answer (with --fail-on-broken).

    \b
    Example:
      pmgaft classify cat.jpg --labels cat,dog,toaster
      pmgaft classify cat.jpg --labels cat,dog,toaster --probe --eps 1/255 --fail-on-broken
    """
    from .client import Client, Question

    if fail_on_broken and not probe:
        raise click.UsageError("--fail-on-broken needs --probe")
    question = Question(
        labels=_labels(labels, label_file),
        templates=template or None,
        top_k=top_k,
        probe=_probe(eps, steps, seed) if probe else None,
    )
    with Client(url, token) as client:
        return _ask(client, images, question, as_json, EXIT_BROKEN if fail_on_broken else 0)


def _ask(client: Client, images: tuple[Path, ...], question: Question, as_json: bool, broken_code: int) -> int:
    """Ask about each image; one that fails does not keep the others from being answered."""
    from pmgaft.console import note, step
    from pmgaft.errors import ImageError

    from .client import RefusedError

    failed, broken = 0, 0
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
        _show(image, answer, as_json)
        if answer.probe is not None and answer.probe.verdict == "broken":
            broken = broken_code
    return failed or broken


def _show(image: Path, answer: Answer, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"image": str(image)} | answer.model_dump(exclude_none=True), ensure_ascii=False))
        return
    from rich.console import Console

    from .display import show

    show(Console(highlight=False), str(image), answer)


def _labels(labels: tuple[str, ...], label_file: Path | None) -> list[str]:
    """All labels of the command line, then those of the file."""
    listed = [label.strip() for text in labels for label in text.split(",")]
    if label_file is not None:
        try:
            lines = label_file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise click.UsageError(f"{label_file} is not UTF-8 text") from None
        listed += [line.strip() for line in lines if line.strip()]
    if not listed:
        raise click.UsageError("give --labels cat,dog,toaster or --label-file FILE")
    return listed


def _probe(eps: str, steps: int, seed: int) -> dict[str, Any]:
    from pmgaft.threat import parse_eps

    parse_eps(eps)  # a slip is told before anything is sent
    return {"eps": eps, "steps": steps, "seed": seed}
