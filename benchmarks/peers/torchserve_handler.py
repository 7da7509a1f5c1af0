"""A plain TorchServe handler that calls open_clip for every request, as in TorchServe's documentation."""

from __future__ import annotations

import sys
from typing import Any


class Handler:
    def initialize(self, context: Any) -> None:
        settings = context.model_yaml_config["handler"]
        sys.path.insert(0, settings["peers"])
        from common import PlainClip

        self.clip = PlainClip(settings["model"], settings["threads"])

    def handle(self, data: list[dict[str, bytearray]], context: Any) -> list[dict[str, Any]]:
        return [self.clip.answer(bytes(one["image"]), bytes(one["labels"]).decode()) for one in data]
