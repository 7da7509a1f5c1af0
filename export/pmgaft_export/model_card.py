"""What a bundle says about itself to people: model_card.md, written from its manifest."""

import json

from .bundle import Manifest


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


def _parity(manifest: Manifest) -> list[str]:
    batches = " and ".join(map(str, manifest.differentiable.batches))
    return [
        f"## Exported against eager, batches of {batches}",
        "",
        "| format | image features | text features | same best text |",
        "|---|---|---|---|",
        *(
            f"| {name} | {entry.parity.image_difference:.1e} | {entry.parity.text_difference:.1e} "
            f"| {entry.parity.top1_agreement:.0%} |"
            for name, entry in manifest.formats.items()
        ),
        "",
        f"Input gradient, for probes: {manifest.differentiable.gradient_difference:.1e} of its length away from eager.",
        "",
    ]


def _recipe(manifest: Manifest) -> list[str]:
    if manifest.source.recipe is None:
        return []
    return ["## Recipe", "", "```json", json.dumps(manifest.source.recipe, indent=2), "```", ""]
