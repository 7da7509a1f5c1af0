"""`pmgaft export`: a model or a training run becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from .bundle import Bundle


@click.command()
@click.argument("model_or_run")
@click.option(
    "--output-dir",
    required=True,
    type=click.Path(path_type=Path),
    help="Directory of the bundle; made by this command.",
)
@click.option(
    "--format", "formats", multiple=True, default=("torchscript", "onnx"), show_default=True,
    help="A format to write; may be repeated. torchscript or onnx.",
)  # fmt: skip
@click.option(
    "--pretrained", help="Weights for an open_clip model name: a tag, or a published robust checkpoint's file."
)
@click.option("--force", is_flag=True, help="Replace a bundle that is already there.")
def export(model_or_run: str, output_dir: Path, formats: tuple[str, ...], pretrained: str | None, force: bool) -> None:
    """Write a model as a bundle that `pmgaft serve` can serve.

    MODEL_OR_RUN is the directory of a training run, mini, mini-robust, or any open_clip model. Each format holds the
    image encoder (pixels in [0, 1] -> unit features) and the text encoder, and must agree with the original model at
    two batch sizes: otherwise nothing is written.

    \b
    Example:
      pmgaft export runs/demo --output-dir bundles/demo
      pmgaft export ViT-B-32-quickgelu --pretrained model_best.pth.tar --output-dir bundles/robust
    """
    from pmgaft.console import note, step

    with step(f"loading {model_or_run}"):
        from pmgaft.clip.loading import load_clip

        from .build import check_formats, check_free, export_bundle, source_of

        check_formats(formats)
        check_free(output_dir, force=force)
        clip = load_clip(model_or_run, pretrained)
    run = Path(model_or_run) if Path(model_or_run, "model").is_dir() else None
    report(export_bundle(clip, output_dir, formats, source=source_of(clip, run), force=force, progress=note))


def report(bundle: Bundle) -> None:
    """Print what was written, how well it agrees with the model, and what to type next."""
    from pmgaft.console import print_table

    manifest, probe = bundle.manifest, bundle.manifest.differentiable
    rows = [
        (name, f"{found.image_difference:.1e}", f"{found.text_difference:.1e}", f"{found.top1_agreement:.0%}", "")
        for name, found in ((name, entry.parity) for name, entry in manifest.formats.items())
    ]
    rows.append(("probe", f"{probe.image_difference:.1e}", "", "", f"{probe.gradient_difference:.1e}"))
    title = f"exported against eager, batches of {' and '.join(map(str, probe.batches))}: largest difference"
    print_table(("encoders", "image", "text", "same best text", "input gradient"), rows, title)
    megabytes = sum(entry.size for entry in manifest.files) / 1e6
    click.echo(f"{bundle.directory}: {len(manifest.files) + 1} files, {megabytes:.1f} MB, {bundle.hash}")
    click.echo(f"next: pmgaft serve {bundle.directory}")
