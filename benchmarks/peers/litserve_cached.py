"""LitServe as somebody writes it who knows what matters: label vectors kept, images batched, and an ONNX encoder.

python litserve_cached.py MODEL --onnx IMAGE.onnx --port PORT --threads N. The encoder is the file that pmgaft serves
(pixels in [0, 1] -> unit features), so that both servers run the same engine. Known labels are encoded once.
"""

import argparse
import json
from typing import Any

import litserve
import numpy as np
import onnxruntime
import torch
from common import PlainClip
from fastapi import Request
from torchvision.transforms import Normalize


class Cached(litserve.LitAPI):
    def __init__(self, model: str, onnx: str, threads: int) -> None:
        super().__init__(max_batch_size=8, batch_timeout=0.005)
        self.name, self.onnx, self.count = model, onnx, threads

    def setup(self, device: str) -> None:
        self.clip = PlainClip(self.name, self.count)
        # the encoder normalises by itself
        steps = self.clip.transform.transforms
        self.clip.transform.transforms = [step for step in steps if not isinstance(step, Normalize)]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.count
        self.encoder = onnxruntime.InferenceSession(self.onnx, options, providers=["CPUExecutionProvider"])
        self.input = self.encoder.get_inputs()[0].name
        self.kept: dict[str, torch.Tensor] = {}

    def decode_request(self, request: Request) -> tuple[np.ndarray, list[str]]:
        return self.clip.pixels(request["image"].file.read())[0].numpy(), json.loads(request["labels"])

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, asked: list[tuple[np.ndarray, list[str]]]) -> list[dict[str, Any]]:
        features = torch.from_numpy(self.encoder.run(None, {self.input: np.stack([pixels for pixels, _ in asked])})[0])
        return [
            self.clip.best(row, self.labels(labels), labels) for row, (_, labels) in zip(features, asked, strict=True)
        ]

    def labels(self, labels: list[str]) -> torch.Tensor:
        missing = [label for label in labels if label not in self.kept]
        for start in range(0, len(missing), 100):
            some = missing[start : start + 100]
            self.kept.update(zip(some, self.clip.texts(some), strict=True))
        return torch.stack([self.kept[label] for label in labels])

    def unbatch(self, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return answers

    def encode_response(self, answer):  # no annotation: LitServe would check the answer against it, and be slower
        return answer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--onnx", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    chosen = parser.parse_args()
    api = Cached(chosen.model, chosen.onnx, chosen.threads)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=600)
    server.run(host="127.0.0.1", port=chosen.port, generate_client_file=False, num_api_servers=1)
