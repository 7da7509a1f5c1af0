"""What the peers share: a CLIP as one gets it from open_clip, and the answer to one picture, written down plainly."""

from __future__ import annotations

import io
import json
from typing import Any

import open_clip
import torch
from PIL import Image

TEMPLATE = "a photo of a {}."


class PlainClip:
    """open_clip's model, transform and tokenizer, used as its README does."""

    def __init__(self, model: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model, self.transform = open_clip.create_model_from_pretrained(model)
        self.tokenizer = open_clip.get_tokenizer(model)
        self.model.eval()

    def pixels(self, image: bytes) -> torch.Tensor:
        """[1, 3, H, W], normalised."""
        return self.transform(Image.open(io.BytesIO(image)).convert("RGB")).unsqueeze(0)

    @torch.inference_mode()
    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Unit features [B, D]."""
        return self.model.encode_image(pixels, normalize=True)

    @torch.inference_mode()
    def texts(self, labels: list[str]) -> torch.Tensor:
        """Unit features [K, D], at the full context length, as encode_text does it."""
        return self.model.encode_text(self.tokenizer([TEMPLATE.format(label) for label in labels]), normalize=True)

    def best(self, image: torch.Tensor, texts: torch.Tensor, labels: list[str]) -> dict[str, Any]:
        """The five best labels for features [D]."""
        with torch.inference_mode():
            probabilities = (self.model.logit_scale.exp() * texts @ image).softmax(dim=0)
            values, order = probabilities.topk(min(5, len(labels)))
        rows = zip(order.tolist(), values.tolist(), strict=True)
        return {"predictions": [{"label": labels[i], "probability": value} for i, value in rows]}

    def answer(self, image: bytes, labels: str) -> dict[str, Any]:
        """One picture, all work done now."""
        names = json.loads(labels)
        return self.best(self.images(self.pixels(image))[0], self.texts(names), names)
