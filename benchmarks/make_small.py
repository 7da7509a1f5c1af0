"""Make a small sibling of `mini` for comparisons that the model itself is too dear for: a resnet10t for 32 px.

Trained from random weights on the training pictures of Tiny-ImageNet: towards the features that `mini` gives to the
same picture at its own size, towards its answers over the 1,000 ImageNet names, and on the labels. Text tower, text
space and logit scale are `mini`'s. The result is an ordinary open_clip model, in local-dir form.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F

from pmgaft.clip.image import PixelEncoder, fold_batchnorm, freeze
from pmgaft.clip.loading import Clip, load_clip, save_local_dir
from pmgaft.clip.text import DEFAULT_TEMPLATES, label_features
from pmgaft.data import ImageSet, loader, open_dataset
from pmgaft.data.subset import Subset
from pmgaft.objectives import cosine_logits, divergence
from pmgaft.training.parts import guide_words

SIZE = 32
TRUNK = "resnet10t"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="Tiny-ImageNet, as parquet or folders.")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--limit", type=int, help="Training pictures; left out: all.")
    arguments = parser.parse_args()
    mini = load_clip("mini")
    dataset: ImageSet = open_dataset(str(arguments.data), "train")
    if arguments.limit:
        dataset = Subset(dataset, range(arguments.limit))
    features = teacher_features(mini, dataset)
    torch.manual_seed(0)
    small, config = fresh(mini)
    names = label_features(mini.text.encode, guide_words("imagenet-names", ()), DEFAULT_TEMPLATES)
    classes = label_features(mini.text.encode, dataset.class_names, dataset.templates)
    spec = replace(mini.preprocess, size=(SIZE, SIZE))
    encoder = PixelEncoder(small.visual, mini.preprocess.mean, mini.preprocess.std, (SIZE, SIZE))
    encoder = encoder.to(memory_format=torch.channels_last).train()
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.lr, weight_decay=0.02)
    steps = arguments.epochs * (len(dataset) // arguments.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.lr, total_steps=steps, pct_start=0.15)
    batches = loader(dataset, spec, batch_size=arguments.batch, shuffle=True, augment="crop-flip", workers=0, seed=0)
    for step, batch in enumerate(islice(batches, steps)):
        pixels = batch.pixels.contiguous(memory_format=torch.channels_last)
        labels, target = batch.labels, features[batch.indices]
        found = encoder.raw(pixels)
        loss = (
            10 * (1 - F.cosine_similarity(found, target)).mean()
            + divergence(
                cosine_logits(target, names, mini.logit_scale),
                cosine_logits(found, names, mini.logit_scale),
                "teacher-first",
            ).mean()
            + 0.5 * F.cross_entropy(cosine_logits(found, classes, mini.logit_scale), labels)
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            right = float((cosine_logits(found, classes, 1.0).argmax(dim=1) == labels).float().mean())
            print(json.dumps({"step": step, "of": steps, "loss": float(loss.detach()), "accuracy": right}), flush=True)
    encoder.eval()
    save_local_dir(small, config, arguments.output_dir, mini.tokenizer)
    print(f"wrote {arguments.output_dir}")


def fresh(mini: Clip) -> tuple[open_clip.CLIP, dict[str, object]]:
    """`mini` with another image tower, weights random; and its configuration."""
    config = json.loads(json.dumps(mini.open_clip_config))
    config["model_cfg"]["vision_cfg"] = {
        "timm_model_name": TRUNK,
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": SIZE,
    }
    model = open_clip.CLIP(**config["model_cfg"])
    own = {name: value for name, value in mini.open_clip_model.state_dict().items() if not name.startswith("visual.")}
    missing = model.load_state_dict(own, strict=False)
    assert all(name.startswith("visual.") for name in missing.missing_keys)
    return model, config


@torch.no_grad()
def teacher_features(mini: Clip, dataset: ImageSet) -> Tensor:
    """Raw features of `mini` for every picture, float32 [N, D]."""
    encoder = freeze(fold_batchnorm(mini.image)).to(memory_format=torch.channels_last)
    found = []
    for batch in islice(loader(dataset, mini.preprocess, batch_size=64), -(-len(dataset) // 64)):
        found.append(encoder.raw(batch.pixels.contiguous(memory_format=torch.channels_last)))
        if len(found) % 100 == 0:
            print(json.dumps({"teacher_features": 64 * len(found)}), flush=True)
    return torch.cat(found)


if __name__ == "__main__":
    main()
