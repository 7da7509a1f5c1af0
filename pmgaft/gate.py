"""Verdicts as exit codes: what makes a probe a gate in somebody's CI."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import click

EXIT_BROKEN = 3
EXIT_INCONCLUSIVE = 4

fail_on_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--fail-on",
    multiple=True,
    type=click.Choice(["broken", "inconclusive"]),
    help=f"Exit with {EXIT_BROKEN} if an answer broke, {EXIT_INCONCLUSIVE} if nothing can be said of one. Repeatable.",
)


def exit_code(verdicts: Collection[str], fail_on: Collection[str]) -> int:
    """The code of all verdicts together, broken before inconclusive; "error" (not readable) counts as inconclusive."""
    if "broken" in fail_on and "broken" in verdicts:
        return EXIT_BROKEN
    if "inconclusive" in fail_on and {"inconclusive", "error"} & set(verdicts):
        return EXIT_INCONCLUSIVE
    return 0
