"""`pmgaft bench`: how fast a running server answers. Imports click alone at the top: `--help` answers at once."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from .bench import Report

LISTS = 200  # different label lists that are sent in rotation
MEMORY = 64 * 2**20  # for messages that are made beforehand
PICTURE = (500, 375)  # width, height where no picture is given


@click.command(short_help="Load a running server, and measure its throughput and latency.")
@click.argument("url", default="http://127.0.0.1:8080")
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Sent in rotation if several [default: a made-up JPEG of 500 x 375].",
)
@click.option("--labels", multiple=True, help="Separated by commas; or a set's @NAME [default: 10 made-up ones].")
@click.option(
    "--label-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A file with a label a line."
)
@click.option("--draw", type=click.IntRange(1), help="Send so many of the labels, drawn anew for each request.")
@click.option("--fresh", type=click.IntRange(1), help="Send so many labels that no request had before.")
@click.option("--templates", help='A standard set of prompts by name, such as "imagenet".')
@click.option("--top-k", type=click.IntRange(1), help="Labels to be answered.")
@click.option("--concurrency", default=8, show_default=True, type=click.IntRange(1, 1000), help="Requests at once.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Requests a second, come what may (open loop).")
@click.option("--seconds", default=10.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Measured.")
@click.option("--warm-up", default=2.0, show_default=True, type=click.FloatRange(0), help="Seconds before that.")
@click.option(
    "--timeout", default=60.0, show_default=True, type=click.FloatRange(1), help="Of one request, in seconds."
)
@click.option("--token", envvar="PMGAFT_TOKEN", help="What the server asks for; better given as PMGAFT_TOKEN.")
@click.option("--json", "as_json", is_flag=True, help="The figures as JSON.")
def bench(
    url: str,
    images: tuple[Path, ...],
    labels: tuple[str, ...],
    label_file: Path | None,
    draw: int | None,
    fresh: int | None,
    templates: str | None,
    top_k: int | None,
    concurrency: int,
    rate: float | None,
    seconds: float,
    warm_up: float,
    timeout: float,
    token: str | None,
    as_json: bool,
) -> int:
    """Send requests to the server at URL for a while, and print throughput and latency.

    Without --rate, so many clients as --concurrency says ask again as soon as they are answered. With --rate, requests
    are due at that rate, and each one's time counts from when it was due.

    \b
    Exit codes: 0 everything was answered with 200; 1 something was not, or no server is there.

    \b
    Example:
      pmgaft bench http://127.0.0.1:8080 --concurrency 32
      pmgaft bench http://127.0.0.1:8080 --label-file thousand.txt --draw 10 --rate 50 --json
    """
    from .bench import Load, form_message, picture, rotating, run, target_of

    if fresh and (labels or label_file or draw):
        raise click.UsageError("--fresh makes up its own labels")
    target = target_of(url)
    fields = {"templates": templates, "top_k": None if top_k is None else str(top_k)}
    given = {name: value for name, value in fields.items() if value is not None}
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    files = [path.read_bytes() for path in images] or [picture(*PICTURE)]
    if fresh is None:
        lists = _label_lists(labels, label_file, draw)
        count = max(len(files), len(lists), min(LISTS, MEMORY // max(map(len, files))) if draw else 1)
        message = rotating(
            [form_message(target, files[n % len(files)], lists[n % len(lists)], headers, **given) for n in range(count)]
        )
    else:
        run_id = secrets.token_hex(4)

        def message(number: int) -> bytes:
            labels = [f"{run_id} {number} {i}" for i in range(fresh)]
            return form_message(target, files[number % len(files)], labels, headers, **given)

    report = run(
        Load(
            target=target,
            message=message,
            concurrency=concurrency,
            seconds=seconds,
            warmup=warm_up,
            rate=rate,
            timeout=timeout,
        )
    )
    click.echo(json.dumps(report.to_json(), indent=2) if as_json else _text(report))
    return 0 if report.requests and set(report.statuses) == {"200"} and not report.unanswered else 1


def _label_lists(labels: tuple[str, ...], label_file: Path | None, draw: int | None) -> list[list[str] | str]:
    """The lists that are sent in rotation."""
    from .bench import drawn
    from .command import label_list

    listed = label_list(labels, label_file) if labels or label_file else [f"thing {n}" for n in range(10)]
    if draw is None:
        return [listed]
    if isinstance(listed, str) or draw > len(listed):
        raise click.UsageError(f"--draw {draw} needs --labels or --label-file with at least so many labels")
    return list(drawn(listed, draw, LISTS))


def _text(report: Report) -> str:
    """For a person."""
    how = f"{report.rate:g} requests a second" if report.rate else f"{report.concurrency} at once"
    lines = [f"{report.requests} answers in {report.seconds:g} s, {how}: {report.throughput:.1f} a second"]
    if report.latency_ms:
        lines.append("milliseconds  " + "  ".join(f"{name} {ms:.1f}" for name, ms in report.latency_ms.items()))
    if set(report.statuses) - {"200"}:
        codes = ", ".join(f"{code} {count}" for code, count in report.codes.items())
        lines.append("statuses      " + "  ".join(f"{s} {n}" for s, n in report.statuses.items()) + f"  ({codes})")
        lines.append("refused in    " + "  ".join(f"{name} {ms:.1f}" for name, ms in report.refusal_ms.items()))
    if report.unanswered:
        lines.append("unanswered    " + "  ".join(f"{kind} {count}" for kind, count in report.unanswered.items()))
    if report.client_cpu_share > 0.8:
        lines.append(f"this client used {report.client_cpu_share:.0%} of a core: it may be what was measured")
    return "\n".join(lines)
