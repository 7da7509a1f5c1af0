"""The terminal: progress and notes on stderr, results on stdout. What moves is shown to people, never to a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

_PIPE_WIDTH = 240
"""A pipe has no edge at which a table would have to be cut."""


def note(message: str) -> None:
    """One line on stderr."""
    _stderr().print(message, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def step(message: str) -> Iterator[None]:
    """Say what is going on while it lasts: a spinner for a person, one line otherwise."""
    console = _stderr()
    if not console.is_terminal:
        note(message)
        yield
        return
    with console.status(message):
        yield


@contextmanager
def progress(description: str, total: int | None, unit: str = "images") -> Iterator[Callable[[int, str], None]]:
    """A bar with count, rate and remaining time; gives `advance(by, status)`, status being the number that matters.

    total: None where the end is not known. Shows nothing where stderr is no terminal.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    console = _stderr()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total, status="")

        def advance(by: int, status: str = "") -> None:
            bar.update(task, advance=by, status=status)

        yield advance


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """A table on stdout: the first column to the left, all others, being figures, to the right."""
    table = Table(title=title, title_justify="left")
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    console.print(table)


def _stderr() -> Console:
    return Console(stderr=True)  # made anew: stderr may have been replaced since
