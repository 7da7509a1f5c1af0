"""Distils sentence embeddings into a small open_clip text transformer.

A class name or word in any neutral template has one target, so that templates move answers little; a caption has its
own. The rows of whole words in the token table start from the principal components of the words' embeddings.
"""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path

import click
import open_clip
import torch
from common import MEAN_SHARE, class_space, note, unit
from open_clip.model import CLIP
from torch import Tensor, nn

CONFIG = {
    "embed_dim": 384,
    "vision_cfg": {
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "mlp",
        "image_size": 128,
    },
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 112, "heads": 4, "layers": 3},
}
NEUTRAL = (
    "{}",
    "a {}",
    "the {}",
    "a photo of a {}.",
    "a photo of a {}",
    "a photo of the {}.",
    "a photo of {}.",
    "itap of a {}.",
    "a picture of a {}.",
    "a picture of a {}",
    "a good photo of a {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
    "a blurry photo of a {}.",
    "a low resolution photo of a {}.",
    "this is a photo of a {}",
    "this is a photo of a {}.",
    "an image of a {}.",
    "a close-up photo of a {}.",
    "a photo of one {}.",
    "a photo of a {}, a type of food.",
    "a photo of a {}, a type of flower.",
    "a photo of a {} texture.",
    "a cropped photo of the {}.",
    "a bright photo of a {}.",
    "a bad photo of a {}.",
)
BATCH, PARTS = 512, 4
CLASS_SHARE, WORD_SHARE, BARE_SHARE = 0.15, 0.5, 0.3
LEARNING_RATE, WARMUP_STEPS = 2e-3, 100
START, END = 49406, 49407


class Tokens:
    """Token ids of texts, remembered; a filled template is its parts' ids in a row."""

    def __init__(self) -> None:
        self.tokenizer = open_clip.tokenizer.SimpleTokenizer()
        self.known: dict[str, list[int]] = {}

    def of(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer.encode(open_clip.tokenizer._clean_lower(text))
        return self.known[text]

    def filled(self, template: str, word: str) -> list[int]:
        before, after = template.split("{}")
        return self.of(before) + self.of(word) + self.of(after)


def padded(rows: list[list[int]]) -> Tensor:
    """int64 [N, L] with start and end tokens, 0 behind the end."""
    rows = [[START, *row[:30], END] for row in rows]
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens


def encode(model: nn.Module, tokens: Tensor) -> Tensor:
    """Unit features [N, 384], computed over the L positions in use alone."""
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return unit(x[torch.arange(len(tokens)), tokens.argmax(-1)] @ model.text_projection)


class Examples:
    """Texts with targets: class names, words, captions."""

    def __init__(self, work_dir: Path) -> None:
        self.tokens = Tokens()
        self.names, self.classes, mean = class_space(work_dir)
        self.words, self.word_targets = self._read(work_dir / "words.pt", mean)
        self.captions, self.caption_targets = self._read(work_dir / "captions.pt", mean)
        self.held_out = set(random.sample(range(len(self.captions)), 1000))
        self.trained = [i for i in range(len(self.captions)) if i not in self.held_out]

    @staticmethod
    def _read(file: Path, mean: Tensor) -> tuple[list[str], Tensor]:
        saved = torch.load(file, weights_only=True)
        return saved["texts"], unit(saved["embeddings"].float() - MEAN_SHARE * mean)

    def one(self) -> tuple[list[int], Tensor]:
        kind = random.random()
        if kind < CLASS_SHARE:
            i = random.randrange(len(self.names))
            return self.tokens.filled(random.choice(NEUTRAL), self.names[i]), self.classes[i]
        if kind < CLASS_SHARE + WORD_SHARE:
            i = random.randrange(len(self.words))
            template = "{}" if random.random() < BARE_SHARE else random.choice(NEUTRAL)
            return self.tokens.filled(template, self.words[i]), self.word_targets[i]
        i = random.choice(self.trained)
        return self.tokens.of(self.captions[i]), self.caption_targets[i]

    def batch(self) -> list[tuple[Tensor, Tensor]]:
        """A batch in parts of like length: short texts do not pay for long ones."""
        examples = sorted((self.one() for _ in range(BATCH)), key=lambda example: len(example[0]))
        size = BATCH // PARTS
        parts = [examples[start : start + size] for start in range(0, BATCH, size)]
        return [(padded([row for row, _ in part]), torch.stack([target for _, target in part])) for part in parts]

    @torch.inference_mode()
    def agreement(self, model: nn.Module) -> dict[str, float]:
        """Mean cosine to the targets."""
        held_out = sorted(self.held_out)
        captions = encode(model, padded([self.tokens.of(self.captions[i]) for i in held_out]))
        classes = encode(model, padded([self.tokens.filled("a photo of a {}.", name) for name in self.names]))
        return {
            "held_out_captions": round((captions * self.caption_targets[held_out]).sum(-1).mean().item(), 3),
            "classes": round((classes * self.classes).sum(-1).mean().item(), 3),
        }


@torch.no_grad()
def start_table(model: nn.Module, examples: Examples) -> None:
    """Whole words start where their meaning is; the rest small and random."""
    encoder = examples.tokens.tokenizer.encoder
    known = [(encoder[word + "</w>"], i) for i, word in enumerate(examples.words) if word + "</w>" in encoder]
    embeddings = examples.word_targets[[i for _, i in known]]
    width = model.token_embedding.weight.shape[1]
    components = torch.pca_lowrank(embeddings, width, center=False)[2]
    rows = embeddings @ components
    model.token_embedding.weight.normal_(0, 0.02)
    model.token_embedding.weight[[token for token, _ in known]] = rows / rows.std() * 0.05


@click.command()
@click.option("--work-dir", required=True, type=click.Path(path_type=Path))
@click.option("--steps", default=1600, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(work_dir: Path, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    examples = Examples(work_dir)
    model = CLIP(**CONFIG)
    start_table(model, examples)
    trained = {n: p for n, p in model.named_parameters() if not n.startswith("visual.") and n != "logit_scale"}
    table = trained.pop("token_embedding.weight")
    groups = [{"params": [table], "weight_decay": 0.0}, {"params": list(trained.values()), "weight_decay": 0.01}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    started = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / WARMUP_STEPS)
            group["lr"] = LEARNING_RATE * warm * 0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-6
        optimizer.zero_grad()
        total = 0.0
        for tokens, targets in examples.batch():
            loss = (1 - (encode(model, tokens) * targets).sum(-1)).sum() / BATCH
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_([table, *trained.values()], 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"{step + 1} {time.time() - started:.0f} s loss {total:.4f} {examples.agreement(model)}", flush=True)
    for name, cosine in examples.agreement(model).items():
        note(work_dir, f"text_tower.cosine_{name}", cosine)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("visual.")}
    torch.save(state, work_dir / "text_tower.pt")
    (work_dir / "config.json").write_text(json.dumps(CONFIG, indent=2))


if __name__ == "__main__":
    main()
