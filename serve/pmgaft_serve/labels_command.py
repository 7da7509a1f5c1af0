"""`pmgaft labels`: is this list of labels one that pictures can be told apart by? Imports click alone at the top."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pmgaft.clip.text import TextEncoder

EXIT_FOUND = 3


@click.command(short_help="Find labels that are hard to tell apart, before any picture is seen.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", default="mini", show_default=True, help="A bundle, or a model as for `export`.")
@click.option("--templates", help="A standard set of prompts by name, such as imagenet [default: the file's own]")
@click.option("--json", "as_json", is_flag=True, help="The findings as JSON.")
@click.option("--fail-on-findings", is_flag=True, help=f"Exit with {EXIT_FOUND} if there are any.")
def labels(file: Path, model: str, templates: str | None, as_json: bool, fail_on_findings: bool) -> int:
    """Name near-synonyms and overlapping labels in FILE: a label a line, or JSON.

    Between two such labels the smallest change of a picture decides, so that their answers break easily whatever the
    model. Distances are told in distances of two wordings of one label: below 2, the labels are near-synonyms.

    \b
    Exit codes: 0 looked at; 2 the file or the model is wrong; 3 something was found (with --fail-on-findings).

    \b
    Example:
      pmgaft labels pets.txt --model mini-robust
    """
    from pmgaft.clip.lint import lint, wording_distance
    from pmgaft.clip.text import label_features
    from pmgaft.console import print_table, step

    from .label_sets import read_label_set, templates_from

    known = read_label_set(file)
    with step(f"loading {model}"):
        encoder = _encoder(model)
    used = templates_from(templates) if templates else known.templates
    with step(f"encoding {len(known.labels)} labels"):
        wording = wording_distance(encoder.encode)
        found = lint(known.labels, label_features(encoder.encode, known.labels, used), wording)
    if as_json:
        rows = [
            {"kind": one.kind, "labels": list(one.labels), "similarity": one.similarity, "wordings": one.wordings}
            for one in found
        ]
        click.echo(json.dumps({"model": model, "labels": len(known.labels), "findings": rows}, ensure_ascii=False))
    elif found:
        columns = ("label", "and", "kind", "cosine", "wordings")
        print_table(
            columns,
            [
                (*one.labels, one.kind.replace("_", "-"), f"{one.similarity:.3f}", f"{one.wordings:.2f}")
                for one in found
            ],
        )
        click.echo(f"{found[0].statement}")
    else:
        click.echo(f"no two of the {len(known.labels)} labels are hard to tell apart for {model}")
    return EXIT_FOUND if found and fail_on_findings else 0


def _encoder(model: str) -> TextEncoder:
    """The text side of a bundle, or of any model."""
    import os

    import torch

    from pmgaft_export.bundle import MANIFEST, open_bundle

    if not (Path(model) / MANIFEST).is_file():
        from pmgaft.clip.loading import load_clip

        return load_clip(model).text
    from pmgaft.clip.text import TextEncoder

    from .engines import open_engine

    bundle = open_bundle(Path(model))
    engine = open_engine(bundle, "auto", torch.device("cpu"), os.cpu_count() or 1)
    return TextEncoder(bundle.tokenizer(), engine.text, bundle.manifest.text.causal)
