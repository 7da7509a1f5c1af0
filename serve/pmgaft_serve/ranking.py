"""Features of an image and of labels -> the labels in their order. Letters: K labels, D features."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .protocol import Prediction


def rank(
    features: Tensor, text: Tensor, logit_scale: float, labels: Sequence[str], top_k: int | None = None
) -> list[Prediction]:
    """The `top_k` most probable labels (None: all), equal ones in the request's order.

    features: [D]; text: [K, D]. Probabilities are over all K labels.
    """
    similarity = text @ features
    order = similarity.argsort(descending=True, stable=True)[:top_k]
    probability = (logit_scale * similarity).softmax(dim=0)[order]
    rows = zip(order.tolist(), probability.tolist(), similarity[order].tolist(), strict=True)
    return [
        Prediction.model_construct(label=labels[i], probability=round(p, 6), similarity=round(s, 6)) for i, p, s in rows
    ]
