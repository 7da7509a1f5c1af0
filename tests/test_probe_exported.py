"""Probes of a bundle attack its exported encoder: they must come to what the model itself would have said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pmgaft.clip.preprocess import to_pixels
from pmgaft.clip.text import label_features
from pmgaft.probe import ProbeSettings, probe
from pmgaft.threat import ThreatModel
from pmgaft_export.build import Evidence, export_bundle
from pmgaft_serve.engines import differentiable
from tests.conftest import CLASS_NAMES, draw  # type: ignore[import-not-found,unused-ignore]

EPS = {"tiny_clip": 11.5 / 255, "tiny_vit_clip": 7.5 / 255}
"""Where about half of the answers of each model break."""


def pictures(clip: Any, count: int) -> Tensor:
    """Generated pictures, each under noise of its own."""
    pixels = torch.stack([to_pixels(draw(index), clip.preprocess) for index in range(count)])
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    return (pixels + 0.05 * noise).clamp(0, 1)


def verdicts(encode: Any, clip: Any, pixels: Tensor, eps: float) -> list[tuple[str, int]]:
    """Each picture's verdict, and the clean answer."""
    texts = label_features(clip.text.encode, CLASS_NAMES)
    settings = ProbeSettings(threat=ThreatModel(eps=eps), steps=8, losses=("margin",))
    reports = probe(encode, clip.logit_scale, pixels, [texts] * len(pixels), [settings] * len(pixels))
    return [(report.verdict, report.clean_index) for report in reports]


@pytest.mark.parametrize("name", ["tiny_clip", "tiny_vit_clip"])
def test_the_exported_encoder_gives_the_verdicts_of_the_model(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """On 100 pictures. An answer that breaks just at eps may go either way by rounding: only pictures are taken whose
    verdict is the same 3 % below eps and 3 % above it.
    """
    clip, eps = request.getfixturevalue(name), EPS[name]
    pixels = pictures(clip, 140)
    below, above = (verdicts(clip.image, clip, pixels, factor * eps) for factor in (0.97, 1.03))
    clear = torch.tensor([one == other for one, other in zip(below, above, strict=True)]).nonzero()[:100, 0]
    assert len(clear) == 100
    expected = verdicts(clip.image, clip, pixels[clear], eps)
    said = [verdict for verdict, _ in expected]
    assert min(said.count("broken"), said.count("not_broken")) >= 20
    bundle = export_bundle(clip, tmp_path / "bundle", evidence=Evidence(parity_images=12))
    exported = differentiable(bundle, torch.device("cpu"))
    assert verdicts(exported, clip, pixels[clear], eps) == expected
