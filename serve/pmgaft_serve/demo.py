"""The main job from end to end, for a newcomer to watch: `python -m pmgaft_serve.demo`.

Fine-tunes `mini` a little, exports and serves that run and classifies a photograph; then serves `mini` and
`mini-robust` in turn and attacks their answers to the same photograph.
"""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click
import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from rich.console import Console

from pmgaft.errors import InputError

from .client import Client, Question
from .display import show
from .protocol import Answer
from .torchserve import ServeOptions, Server, serving

LABELS = ("cat", "dog", "toaster", "teapot", "lion", "sofa")
EPS = "1/255"
SHOWN = (
    "pmgaft_requests_total",
    "pmgaft_probes_total",
    "pmgaft_probe_gradients_total",
    "pmgaft_label_cache_hits_total",
    "pmgaft_label_cache_misses_total",
    "pmgaft_stage_seconds_count",
)

console = Console(highlight=False)


@click.command()
@click.option("--output-dir", default="demo-output", show_default=True, type=click.Path(path_type=Path))
def main(output_dir: Path) -> None:
    """Train, export, serve, classify and probe, with what the package ships."""
    if output_dir.exists():
        shutil.rmtree(output_dir)
    output_dir.mkdir(parents=True)
    photograph = _cat(output_dir)
    run, bundle = output_dir / "run", output_dir / "bundle"

    _title("1. Fine-tune mini with PMG-AFT on a thousand crops of photographs")
    _pmgaft("train", "demo", "--output-dir", run)
    _title("2. Export the run, proven equal to what was trained")
    _pmgaft("export", run, "--output-dir", bundle)
    _title("3. Serve the export and classify a photograph")
    with _served(bundle) as server:
        _ask(server, "the fresh run", photograph, probe=False)

    _title(f"4. The same photograph, attacked within eps {EPS}: mini, mini-robust")
    answers, moved = {}, {}
    for name in ("mini", "mini-robust"):
        with _served(name) as server:
            before = _series(server)
            answers[name] = _ask(server, name, photograph, probe=True)
            moved[name] = {key: value - before.get(key, 0) for key, value in _series(server).items()}
    console.print(f"\n{_comparison(answers)}", style="bold")

    _title("5. What Prometheus saw of these two requests")
    for name, series in moved.items():
        console.print(f"{name}:")
        for key, increase in series.items():
            if increase:
                console.print(f"  {key}  +{increase:g}", markup=False, soft_wrap=True)

    _title("What is where, and what to type next")
    _next_steps(run, bundle, photograph)


def _cat(directory: Path) -> Path:
    """scikit-image's photograph of a cat, copied."""
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise InputError("the demo's photographs come with scikit-image; pip install 'pmgaft[demo]'")
    return Path(shutil.copyfile(Path(package.origin).parent / "data" / "chelsea.png", directory / "cat.png"))


def _pmgaft(*arguments: str | Path) -> None:
    """Run a `pmgaft` command as a person would type it."""
    words = [str(argument) for argument in arguments]
    _dim(f"$ pmgaft {shlex.join(words)}")
    done = subprocess.run([sys.executable, "-m", "pmgaft", *words], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


@contextmanager
def _served(what: Path | str) -> Iterator[Server]:
    """A server of a bundle, or of a shipped model, on any free port."""
    from pmgaft_export.shipped import bundle_for

    _dim(f"$ pmgaft serve {what}")
    with serving(ServeOptions(bundle=bundle_for(str(what), _dim), port=0), _dim) as server:
        yield server


def _ask(server: Server, title: str, photograph: Path, probe: bool) -> Answer:
    """One request over HTTP, its answer shown."""
    words = f"$ pmgaft classify {photograph} --labels {','.join(LABELS)}"
    _dim(f"{words} --probe --eps {EPS}" if probe else words)
    with Client(server.url) as client:
        answer = client.classify(photograph, Question(labels=LABELS, probe={"eps": EPS} if probe else None))
    show(console, f"{photograph.name}: {title}", answer)
    return answer


def _comparison(answers: Mapping[str, Answer]) -> str:
    """What the probes found, model by model, whatever it is."""
    words = {"broken": "broke", "not_broken": "held against this attack", "inconclusive": "was not decided"}
    found = [f"{name}'s answer {words[answer.probe.verdict]}" for name, answer in answers.items() if answer.probe]
    return f"Within eps {EPS}: {'; '.join(found)}."


def _series(server: Server) -> dict[str, float]:
    """Value of every series of interest, by its name with labels."""
    text = httpx.get(f"{server.metrics_url}/metrics", trust_env=False).text
    return {
        _written(sample): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name in SHOWN
    }


def _written(sample: Sample) -> str:
    labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
    return f"{sample.name}{{{labels}}}" if labels else sample.name


def _next_steps(run: Path, bundle: Path, photograph: Path) -> None:
    console.print(
        f"""  {run}/report.md       what was trained, with its log, recipe and model beside it
  {bundle}/manifest.json   what was exported, and how closely it agrees

  Type next, in two terminals (.venv/bin/pmgaft where the environment is not activated):
    pmgaft serve mini-robust
    pmgaft classify {photograph} --labels cat,dog,toaster --probe --eps 2/255""",
        soft_wrap=True,
    )


def _title(text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}", align="left")


def _dim(text: str) -> None:
    console.print(text, style="dim", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
