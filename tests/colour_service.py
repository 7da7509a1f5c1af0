"""A service over encoders that can be followed by hand, for the tests that put questions to it.

The fake image encoder's feature of a picture is the direction of its mean colour; a label is a colour's name.
"""

import asyncio
import io
import json
import random
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import prometheus_client
import pytest
import torch
from PIL import Image
from torch import Tensor

from pmgaft.clip.preprocess import PreprocessSpec
from pmgaft_serve.label_sets import LabelSet
from pmgaft_serve.metrics import Metrics, total
from pmgaft_serve.model import Model
from pmgaft_serve.protocol import ModelInfo
from pmgaft_serve.service import Incoming, Record, Reply, Service, Settings

T = TypeVar("T")

COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0), "grey": (1.0, 1.0, 1.0)}
POISON = (1, 2, 3)  # a picture of this colour makes the fake encoder fail


def colour_png(colour: tuple[int, int, int], side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


RED, GREEN, BLUE = colour_png((200, 30, 30)), colour_png((30, 200, 30)), colour_png((30, 30, 200))


class Encoder:
    """Mean colours; records batch sizes, waits while `gate` is closed, and fails for poison."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.batches: list[int] = []

    def __call__(self, pixels: Tensor) -> Tensor:
        self.batches.append(len(pixels))
        self.entered.set()
        assert self.gate.wait(20)
        means = pixels.mean(dim=(2, 3))
        if ((means * 255).round() == torch.tensor(POISON)).all(dim=1).any():
            raise RuntimeError("secret: /home/user/key")
        return torch.nn.functional.normalize(means, dim=1)


class Texts:
    """Directions of the colours that are named; records what was encoded, and waits while `gate` is closed."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.calls: list[tuple[str, ...]] = []

    context_length = 77

    def tokens(self, texts: Sequence[str]) -> int:
        return sum(len(text.split()) for text in texts)

    def encode(self, texts: Sequence[str]) -> Tensor:
        self.calls.append(tuple(texts))
        self.entered.set()
        assert self.gate.wait(20)
        named = [next((name for name in COLOURS if name in text), None) for text in texts]
        rows = [COLOURS[name] if name else (0.3, 0.2, 0.1) for name in named]
        return torch.nn.functional.normalize(torch.tensor(rows), dim=1)


class Bench:
    """A service over the fake encoders, with its metrics."""

    def __init__(
        self,
        settings: Settings,
        draining: Callable[[], bool] = lambda: False,
        sets: Sequence[LabelSet] = (),
        warm: Sequence[LabelSet] = (),
        chance: random.Random | None = None,
        lane: Encoder | None = None,
    ) -> None:
        self.encoder, self.gradient, self.texts = Encoder(), Encoder(), Texts()
        self.records: list[Record] = []
        self.metrics = Metrics()
        model = Model(
            info=ModelInfo(name="colours", bundle="sha256:0", engine="fake-cpu", format="fake"),
            image=self.encoder,
            lane=lane,
            gradient=self.gradient,
            text=self.texts,
            preprocess=PreprocessSpec(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3),
            logit_scale=10.0,
        )
        self.service = Service(model, settings, self.metrics, draining, self.records.append, sets, warm, chance)

    async def ask(
        self, image: bytes = RED, labels: str = "red,green,blue", token: str | None = None, **fields: str
    ) -> Reply:
        form = {"image": image, "labels": labels.encode()} | {name: text.encode() for name, text in fields.items()}
        incoming = Incoming(
            fields=form,
            content_type="multipart/form-data",
            authorization=None if token is None else f"Bearer {token}",
            request_id="id",
        )
        return await self.service.answer(incoming)

    def counted(self, name: str, /, **labels: str) -> float:
        return total(prometheus_client.generate_latest(self.metrics.registry).decode(), name, **labels)


@contextmanager
def benches() -> Iterator[Callable[..., Bench]]:
    """Makes benches from a service's settings, and closes them at the end."""
    made: list[Bench] = []

    def bench(
        draining: Callable[[], bool] = lambda: False,
        sets: Sequence[LabelSet] = (),
        warm: Sequence[LabelSet] = (),
        chance: random.Random | None = None,
        lane: Encoder | None = None,
        **settings: Any,
    ) -> Bench:
        made.append(Bench(Settings(**settings), draining, sets, warm, chance, lane))
        return made[-1]

    yield bench
    for one in made:
        one.encoder.gate.set()
        one.gradient.gate.set()
        one.service.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Bench]]:
    """The same, for one test."""
    with benches() as bench:
        yield bench


@pytest.fixture
def bench(make: Callable[..., Bench]) -> Bench:
    """One of the ordinary settings."""
    return make()


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 30))


def ask(bench: Bench, *arguments: Any, **fields: Any) -> Reply:
    return run(bench.ask(*arguments, **fields))


def content(reply: Reply) -> Any:
    return json.loads(reply.body)


def code(reply: Reply) -> str:
    return str(content(reply)["error"]["code"])


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)
