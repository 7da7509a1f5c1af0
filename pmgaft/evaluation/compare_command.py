"""`pmgaft compare`. Everything heavy is imported when the command runs, so that --help answers at once."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pmgaft.errors import InputError


@click.command()
@click.argument("results", nargs=-1, required=True, metavar="[NAME=]RESULT...")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="A .md file; .json and .png beside it.")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
def compare(results: tuple[str, ...], output: Path | None, force: bool) -> None:
    """Put results side by side.

    RESULT is a .json file of pmgaft evaluate, or the directory of a run that was evaluated; patterns are expanded.
    Results that share a NAME are seeds of one method: mean and standard deviation are shown. The first method is
    compared with each other one on the same images (McNemar's exact test). Results of different attacks, images or
    prompts are refused. With --output, a page is written, the same for programs, and pictures; of runs, their
    training curves too.

    \b
    Example:
      pmgaft compare evaluation-mini.json evaluation-mini-robust.json
      pmgaft compare 'tecoa=runs/tecoa-*' 'pmg-aft=runs/pmg-*' --output comparison.md
    """
    from pmgaft import console
    from pmgaft.evaluation import compare as comparing
    from pmgaft.evaluation.plots import can_plot, plot_comparison, plot_curves
    from pmgaft.evaluation.work import write_atomically

    if output is not None and output.suffix != ".md":
        raise InputError(f"--output names a .md file, not {output}")
    if output is not None and output.exists() and not force:
        raise InputError(f"{output} exists; name another --output, or overwrite it with --force")
    entries = comparing.read_entries(results)
    methods = comparing.by_method(entries)
    for entry in entries:
        if entry.result is None:
            console.note(f"{entry.path.parent} has not been evaluated: only its training curves can be shown")
    if methods:
        console.print_table(*comparing.averages_table(methods), title="average over the sets")
        console.print_table(*comparing.sets_table(methods))
    if len(methods) > 1:
        console.print_table(*comparing.pairs_table(methods), title="on the same images, McNemar's exact p")
    if output is None:
        return
    pictures = []
    if can_plot():
        if methods and comparing.eps_of(methods):
            picture = output.with_suffix(".png")
            plot_comparison({name: [e.result for e in seeds if e.result] for name, seeds in methods.items()}, picture)
            pictures.append(picture)
        logs = {e.path.parent.name: e.log for e in entries if e.log is not None}
        if logs:
            picture = output.with_name(f"{output.stem}-training.png")
            plot_curves(logs, picture)
            pictures.append(picture)
    else:
        console.note('no pictures: they need matplotlib (pip install "pmgaft[plots]")')
    names = [picture.name for picture in pictures]
    if methods:
        content = json.dumps(comparing.comparison_json(methods), indent=2) + "\n"
        write_atomically(output.with_suffix(".json"), content.encode())
    write_atomically(output, comparing.comparison_markdown(methods, names).encode())
    console.note("written: " + ", ".join(map(str, [output, *pictures])))
