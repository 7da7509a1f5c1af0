"""The trained model, in the forms that others use.

RUN/model/               the whole model in open_clip's local-dir form
RUN/visual.safetensors   the image tower alone, under the names it has in open_clip's and OpenAI's `model.visual`
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from pmgaft.clip.image import PixelEncoder
from pmgaft.clip.loading import Clip, save_local_dir
from pmgaft.training.folding import unfold_batchnorm

VISUAL_FILE = "visual.safetensors"


def save_model(directory: Path, trained: PixelEncoder, clip: Clip, *, folded: bool) -> None:
    """Write a trained image encoder, with the text tower of the `clip` it was made from. Neither form is ever half
    written.

    folded: it was trained with its BatchNorm folded into convolutions, and is written as it was before.
    """
    encoder = unfold_batchnorm(trained, clip.image) if folded else trained
    model = copy.deepcopy(clip.open_clip_model)
    assert isinstance(model.visual, nn.Module)
    model.visual.load_state_dict(encoder.tower.state_dict())
    save_local_dir(model, clip.open_clip_config, directory / "model", clip.tokenizer)
    scratch = directory / f".{VISUAL_FILE}.{os.getpid()}"
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.visual.state_dict().items()}
    try:
        save_file(state, scratch)
        os.replace(scratch, directory / VISUAL_FILE)
    finally:
        scratch.unlink(missing_ok=True)
