"""LitServe with open_clip called for every request: python litserve_plain.py MODEL --port PORT --threads N."""

import argparse
from typing import Any

import litserve
from common import PlainClip
from fastapi import Request


class Plain(litserve.LitAPI):
    def __init__(self, model: str, threads: int) -> None:
        super().__init__()
        self.name, self.count = model, threads

    def setup(self, device: str) -> None:
        self.clip = PlainClip(self.name, self.count)

    def decode_request(self, request: Request) -> tuple[bytes, str]:
        return request["image"].file.read(), request["labels"]

    def predict(self, asked: tuple[bytes, str]) -> dict[str, Any]:
        return self.clip.answer(*asked)

    def encode_response(self, answer):  # no annotation: LitServe would check the answer against it, and be slower
        return answer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    chosen = parser.parse_args()
    server = litserve.LitServer(
        Plain(chosen.model, chosen.threads), accelerator="cpu", workers_per_device=1, timeout=600
    )
    server.run(host="127.0.0.1", port=chosen.port, generate_client_file=False, num_api_servers=1)
