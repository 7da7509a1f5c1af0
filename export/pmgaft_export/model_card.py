"""What a bundle says about itself to people: model_card.md, written from its manifest."""

import json

from .bundle import Manifest, Parity


def model_card(manifest: Manifest) -> str:
    """Markdown: what the model is, where it came from, how well each format agrees, what its answers mean."""
    return "\n".join(
        (
            f"# {manifest.name}",
            "",
            "A CLIP for zero-shot image classification, exported by pmgaft: a picture and any list of labels go in,",
            "the labels come out ranked.",
            "",
            *_facts(manifest),
            *_parity(manifest),
            *_recipe(manifest),
            "## Use",
            "",
            "`pmgaft serve BUNDLE`, then `pmgaft classify picture.jpg --labels cat,dog,toaster`.",
            "",
            "Probabilities are over the labels of the request alone: a picture of none of them still gets a best one.",
            "A probe that answers `not_broken` found no adversarial image with its attack, norm, eps and budget;",
            "another attack may find one. Accuracy, clean and under attack, is measured by `pmgaft evaluate`, not",
            "promised here. Licence and known failures are those of the weights and data named above.",
            "",
        )
    )


def _facts(manifest: Manifest) -> list[str]:
    source, height_width = manifest.source, " x ".join(map(str, manifest.preprocess.size))
    rows = {
        "model": source.model,
        "pretrained": source.pretrained,
        "training run": source.run,
        "hash of its tensors": source.tensors,
        "exported": f"{manifest.created} by pmgaft {manifest.versions['pmgaft']}, torch {manifest.versions['torch']}",
        "pixels": f"3 x {height_width}, {manifest.preprocess.resize_mode} resize, {manifest.preprocess.interpolation}",
        "label length": f"at most {manifest.text.context_length} tokens with its template",
        "features": manifest.embed_dim,
        "logit scale": f"{manifest.logit_scale:.4g}",
    }
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value is not None), ""]


def cost(parity: Parity) -> str:
    """Clean accuracy on the sample before and after, in percent; empty where the sample has no labels."""
    if parity.accuracy is None:
        return ""
    before = 100 * parity.accuracy
    return f"{before:.1f} -> {before - parity.cost_points:.1f} ± {parity.cost_error_points:.1f}"


def _parity(manifest: Manifest) -> list[str]:
    batches = " and ".join(map(str, manifest.differentiable.batches))
    lines = [
        "## Exported against eager",
        "",
        f"Largest difference of one component of a unit feature at batches of {batches}; the lowest cosine of image",
        "features, the same best label, and clean accuracy (percent, original -> exported, ± one standard error of the",
        "difference) on the images named.",
        "",
        "| format | image features | text features | cosine | same best label | clean accuracy | images |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, entry in manifest.formats.items():
        found = entry.parity
        lines.append(
            f"| {name} | {found.image_difference:.1e} | {found.text_difference:.1e} | {found.cosine:.5f} "
            f"| {found.top1_agreement:.1%} | {cost(found)} | {found.images} of {found.sample} |"
        )
    lines += [
        "",
        f"Input gradient, for probes: {manifest.differentiable.gradient_difference:.1e} of its length away from eager.",
        "",
    ]
    if manifest.speeds:
        lines += ["| timed | machine | batch | images a second |", "|---|---|---|---|"]
        lines += [
            f"| {one.format} | {one.machine} | {one.batch} | {one.images_per_second:.1f} |" for one in manifest.speeds
        ]
        lines.append("")
    return lines


def _recipe(manifest: Manifest) -> list[str]:
    if manifest.source.recipe is None:
        return []
    return ["## Recipe", "", "```json", json.dumps(manifest.source.recipe, indent=2), "```", ""]
