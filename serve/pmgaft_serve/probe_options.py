"""What `pmgaft serve` and `pmgaft classify` take about probes. Imports click alone at the top."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

if TYPE_CHECKING:
    from .probing import ProbePolicy
    from .sampling import SamplePolicy

F = TypeVar("F", bound=Callable[..., Any])

_SERVE = (
    click.option(
        "--probe", type=click.Choice(["off", "on", "token"]),
        help="Whether requests may ask for a probe; token: those that send --probe-token.  [default: on, on a loopback "
        "--host; else off]",
    ),
    click.option(
        "--probe-token", envvar="PMGAFT_PROBE_TOKEN",
        help="With --probe token: what such clients send as their token; better given as PMGAFT_PROBE_TOKEN.",
    ),
    click.option(
        "--probe-token-file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="The same from a file of one line.",
    ),
    click.option("--probe-images", is_flag=True, help="Probes may return the adversarial images they find."),
    click.option(
        "--probe-queue", default=8, show_default=True, type=click.IntRange(1),
        help="Requests with a probe in work or waiting; others get 429.",
    ),
    click.option("--probe-rate", type=click.IntRange(1), help="Images probed in any minute, all workers together."),
    click.option(
        "--probe-seconds", default=30.0, show_default=True, type=click.FloatRange(0.1), help="Most for one probe."
    ),
    click.option(
        "--probe-sample-rate", default=0.0, show_default=True, type=click.FloatRange(0, 1),
        help="Share of ordinary traffic to probe in the background, for Prometheus.",
    ),
    click.option(
        "--probe-sample-eps", default="0.5/255,1/255,2/255,4/255", show_default=True,
        help="Radii (linf) that it is told for.",
    ),
    click.option(
        "--probe-sample-queue", default=8, show_default=True, type=click.IntRange(1),
        help="Sampled images that wait; more are dropped and counted.",
    ),
)  # fmt: skip

_CLASSIFY = (
    click.option("--probe", is_flag=True, help="Attack each answer, and say whether it broke. What follows needs it."),
    click.option("--eps", help="Largest change of a pixel, or in l2 of all.  [default: 1/255]"),
    click.option("--norm", type=click.Choice(["linf", "l2"]), help="[default: linf]"),
    click.option("--attack", type=click.Choice(["pgd", "apgd"]), help="[default: apgd from 50 steps on, else pgd]"),
    click.option(
        "--loss", "losses", multiple=True, type=click.Choice(["ce", "margin", "dlr"]), help="[default: ce and margin]"
    ),
    click.option("--steps", type=click.IntRange(1), help="Of each loss and restart.  [default: 20]"),
    click.option("--restarts", type=click.IntRange(1), help="[default: 1]"),
    click.option("--seed", type=click.IntRange(0), help="[default: 0]"),
    click.option("--seconds", type=click.FloatRange(0, min_open=True), help="At most.  [default: the server's]"),
    click.option("--target", help="The label that the answer must become.  [default: any other]"),
    click.option("--group", "groups", multiple=True, help="Labels that count as one answer: car,automobile."),
    click.option("--min-eps", is_flag=True, help="Search the smallest eps."),
    click.option("--targets", type=click.IntRange(1), help="Also search it for so many other labels."),
    click.option("--health", is_flag=True, help="Check the attack itself."),
    click.option("--square", type=click.IntRange(1), help="With --health: queries of an attack without gradients."),
    click.option("--survival", is_flag=True, help="Say whether what was found survives JPEG, resizing, rounding."),
    click.option("--wording", help="Other templates to try, as the name of a standard set: simple, imagenet."),
    click.option("--synonym", "synonyms", multiple=True, help="Another name of the answer, to try. Repeatable."),
    click.option(
        "--certify", type=click.FloatRange(0, min_open=True), metavar="SIGMA",
        help="An l2 certificate under noise of this deviation.",
    ),
    click.option("--draws", type=click.IntRange(1), help="With --certify.  [default: 1000]"),
    click.option(
        "--save-adversarial", type=click.Path(dir_okay=False, path_type=Path),
        help="A PNG of what was found, where the server permits it.",
    ),
)  # fmt: skip


def serve_options(command: F) -> F:
    """The options of `pmgaft serve` about probes."""
    return _all(_SERVE, command)


def classify_options(command: F) -> F:
    """The options of `pmgaft classify` about probes."""
    return _all(_CLASSIFY, command)


def probe_policy(options: Mapping[str, Any], *, loopback: bool, workers: int) -> ProbePolicy:
    """From the values of `serve_options`. Raises: InputError (token_missing, probe_token_unused)."""
    from pmgaft.errors import InputError

    from .credentials import read_token
    from .probing import ProbePolicy

    token = read_token("probe-token", options["probe_token"], options["probe_token_file"])
    allow: Literal["off", "on", "token"] = options["probe"] or ("token" if token else "on" if loopback else "off")
    if allow == "token" and not token:
        message = "--probe token needs a --probe-token (better: PMGAFT_PROBE_TOKEN) that clients must send"
        raise InputError(message, field="probe_token", code="token_missing")
    if allow != "token" and token:
        message = f"a probe token is only asked for by --probe token, not by --probe {allow}"
        raise InputError(message, field="probe_token", code="probe_token_unused")
    rate = options["probe_rate"]
    return ProbePolicy(
        allow=allow,
        token=token,
        images=options["probe_images"],
        queue=options["probe_queue"],
        rate=None if rate is None else max(1, rate // workers),
        seconds=options["probe_seconds"],
    )


def sample_policy(options: Mapping[str, Any]) -> SamplePolicy:
    """From the values of `serve_options`. Raises: ThreatError (eps_invalid)."""
    from pmgaft.threat import parse_eps

    from .sampling import SamplePolicy

    eps = sorted({parse_eps(text) for text in options["probe_sample_eps"].split(",")})
    return SamplePolicy(rate=options["probe_sample_rate"], eps=tuple(eps), queue=options["probe_sample_queue"])


def probe_fields(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a request's field `probe` holds, from the values of `classify_options`; None without --probe.

    Raises: ThreatError (eps_invalid) before anything is sent.
    """
    from pmgaft.threat import parse_eps

    given = {name: value for name, value in options.items() if value not in (None, (), False) and name != "probe"}
    if not options["probe"]:
        if given:
            raise click.UsageError(f"{_spelled(next(iter(given)))} needs --probe")
        return None
    parse_eps(given.setdefault("eps", "1/255"), given.get("norm", "linf"))
    if "groups" in given:
        given["groups"] = [[label.strip() for label in group.split(",")] for group in given["groups"]]
    if given.pop("save_adversarial", None) is not None:
        given["return_image"] = True
    return given


def _all(options: Sequence[Callable[[F], F]], command: F) -> F:
    for option in reversed(options):
        command = option(command)
    return command


def _spelled(name: str) -> str:
    """A parameter's name as the option that gave it."""
    one = {"losses": "loss", "groups": "group", "synonyms": "synonym"}.get(name, name)
    return "--" + one.replace("_", "-")
