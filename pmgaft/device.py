"""Which device to compute on, and how exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pmgaft.errors import InputError, quote


def pick_device(name: str = "auto") -> torch.device:
    """The device called "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".

    Raises: InputError (device_invalid) for another name, or for a GPU that is not there.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda:0" if gpus else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind != "cuda" or (name != "cuda" and not index.isdecimal()):
        raise _device_error(f"device must be auto, cpu, cuda or cuda:N, not {quote(name)}")
    number = int(index or 0)
    if number >= gpus:
        seen = f"only {gpus} GPU{'s are' if gpus > 1 else ' is'}" if gpus else "no GPU is"
        raise _device_error(f"device {name} was asked for, but {seen} visible to torch; use --device auto or cpu")
    return torch.device("cuda", number)


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """While it lasts, GPUs multiply float32 in full, or with factors rounded to TF32's 10 bits. Elsewhere nothing
    changes.

    torch by itself rounds in convolutions and not in matrix products.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def _device_error(message: str) -> InputError:
    return InputError(message, field="device", code="device_invalid")
