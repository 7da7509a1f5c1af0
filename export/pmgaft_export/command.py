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
    from pmgaft.console import step

    from .build import check_formats, check_free, export_bundle, source_of

    check_formats(formats)
    check_free(output_dir, force=force)
    with step(f"loading {model_or_run}"):
        from pmgaft.clip.loading import load_clip

        clip = load_clip(model_or_run, pretrained)
    run = Path(model_or_run) if Path(model_or_run, "model").is_dir() else None
    bundle = export_bundle(clip, output_dir, formats, source=source_of(clip, run), force=force)
    click.echo(summary(bundle))


def summary(bundle: Bundle) -> str:
    """What was written, how well it agrees with the model, and what to type next."""
    manifest = bundle.manifest
    batches = " and ".join(map(str, manifest.differentiable.batches))
    megabytes = sum(entry.size for entry in manifest.files) / 1e6
    lines = [f"exported against eager, batches of {batches} (largest difference):"]
    lines += [
        f"  {name:<12} image features {entry.parity.image_difference:.1e}, text features "
        f"{entry.parity.text_difference:.1e}, same best text {entry.parity.top1_agreement:.0%}"
        for name, entry in manifest.formats.items()
    ]
    lines += [
        f"  {'probe':<12} input gradient {manifest.differentiable.gradient_difference:.1e} of its length",
        f"{bundle.directory}: {len(manifest.files) + 1} files, {megabytes:.1f} MB, {bundle.hash}",
        f"next: pmgaft serve {bundle.directory}",
    ]
    return "\n".join(lines)
