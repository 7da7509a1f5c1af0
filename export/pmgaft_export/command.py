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
    "--format", "formats", multiple=True, default=("torchscript", "onnx"), show_default=True, metavar="NAME",
    help="auto, torchscript, torchscript-fp16, onnx, onnx-fp16, onnx-int8, pt2 or pt2-fp16; may be repeated. "
    "auto times those that suit the device and keeps the quickest.",
)  # fmt: skip
@click.option(
    "--pretrained", help="Weights for an open_clip model name: a tag, or a published robust checkpoint's file."
)
@click.option("--parity-data", metavar="DATASET", help="Labelled pictures to compare on [default: built-in ones]")
@click.option(
    "--parity-images", default=120, show_default=True, type=click.IntRange(8), help="Pictures to compare on, at most."
)
@click.option(
    "--calibration", metavar="DATASET", help="Pictures to measure onnx-int8's scales on [default: built-in ones]"
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="auto, cpu, cuda or cuda:N: to compile for, time and compare on.",
)
@click.option("--force", is_flag=True, help="Replace a bundle that is already there.")
def export(
    model_or_run: str,
    output_dir: Path,
    formats: tuple[str, ...],
    pretrained: str | None,
    parity_data: str | None,
    parity_images: int,
    calibration: str | None,
    device: str,
    force: bool,
) -> None:
    """Write a model as a bundle that `pmgaft serve` can serve.

    MODEL_OR_RUN is the directory of a training run, mini, mini-robust, or any open_clip model. Each format holds the
    image encoder (pixels in [0, 1] -> unit features) and the text encoder, and must agree with the original model, in
    features at two batch sizes and in answers on pictures: otherwise nothing is written. DATASET is what
    `pmgaft evaluate` takes; the built-in pictures are a few photographs from scikit-image.

    \b
    Example:
      pmgaft export runs/demo --output-dir bundles/demo
      pmgaft export mini --format auto --parity-data data/caltech101 --parity-images 1000 --output-dir bundles/mini
      pmgaft export ViT-B-32-quickgelu --pretrained openai+model_best.pth.tar --output-dir bundles/robust
    """
    from pmgaft.console import note, step
    from pmgaft.device import pick_device

    picked = pick_device(device)
    with step(f"loading {model_or_run}"):
        from pmgaft.clip.loading import load_clip

        from .build import Evidence, check_formats, check_free, export_bundle, source_of

        check_formats(formats)
        check_free(output_dir, force=force)
        clip = load_clip(model_or_run, pretrained)
    run = Path(model_or_run) if Path(model_or_run, "model").is_dir() else None
    evidence = Evidence(parity_data=parity_data, parity_images=parity_images, calibration=calibration, device=picked)
    source = source_of(clip, run)
    report(export_bundle(clip, output_dir, formats, source=source, evidence=evidence, force=force, progress=note))


def report(bundle: Bundle) -> None:
    """Print what was written, how well it agrees with the model, and what to type next."""
    from pmgaft.console import print_table

    from .model_card import cost

    manifest, probe = bundle.manifest, bundle.manifest.differentiable
    rows = [
        (
            name,
            f"{entry.parity.image_difference:.1e}",
            f"{entry.parity.text_difference:.1e}",
            f"{entry.parity.cosine:.5f}",
            f"{entry.parity.top1_agreement:.1%}",
            cost(entry.parity),
            "",
        )
        for name, entry in manifest.formats.items()
    ]
    rows.append(("probe", f"{probe.image_difference:.1e}", "", "", "", "", f"{probe.gradient_difference:.1e}"))
    batches = " and ".join(map(str, probe.batches))
    sample = next(iter(manifest.formats.values())).parity
    title = (
        f"exported against eager: largest difference of features at batches of {batches}; "
        f"lowest cosine and answers on {sample.images} images of {sample.sample}"
    )
    columns = ("encoders", "image", "text", "cosine", "same answer", "clean accuracy", "input gradient")
    print_table(columns, rows, title)
    for speed in manifest.speeds:
        click.echo(f"{speed.format} on {speed.machine}: {speed.images_per_second:.1f} images/s at batch {speed.batch}")
    for kind, name in manifest.quickest.items():
        click.echo(f"on a {kind} of this kind, {name} is served by default")
    megabytes = sum(entry.size for entry in manifest.files) / 1e6
    click.echo(f"{bundle.directory}: {len(manifest.files) + 1} files, {megabytes:.1f} MB, {bundle.hash}")
    click.echo(f"next: pmgaft serve {bundle.directory}")
