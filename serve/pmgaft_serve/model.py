"""What a service serves: one bundle's encoders, ready to run. Letters: B images, H, W, N texts, D features."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pmgaft.clip.preprocess import PreprocessSpec
from pmgaft.clip.text import TextEncoder
from pmgaft_export.bundle import Bundle

from . import protocol
from .engines import Encode, differentiable, open_engine, open_lane
from .texts import TextModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is served. image: pixels [B, 3, H, W] -> unit features [B, D]; lane: the same, for batches beside each
    other, if that is of use; gradient: the same, with a derivative; text: of texts.
    """

    info: protocol.ModelInfo
    image: Encode
    lane: Encode | None = None
    gradient: Encode
    text: TextModel
    preprocess: PreprocessSpec
    logit_scale: float


def model_of(bundle: Bundle, engine: str, device: torch.device, threads: int) -> Model:
    """Load what is served from a bundle. engine: as for `open_engine`. Raises: BundleError, InputError."""
    opened = open_engine(bundle, engine, device, threads)
    encoder = TextEncoder(bundle.tokenizer(), opened.text, bundle.manifest.text.causal)
    return Model(
        info=protocol.ModelInfo(
            name=bundle.manifest.name, bundle=bundle.hash, engine=opened.name, format=opened.format
        ),
        image=opened.image,
        lane=open_lane(bundle, opened.format, device, threads),
        gradient=differentiable(bundle, device),
        text=encoder,
        preprocess=bundle.preprocess,
        logit_scale=bundle.manifest.logit_scale,
    )
