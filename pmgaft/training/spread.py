"""One student, trained by several ranks: a copy on each (DDP), or a share of it on each (FSDP).

Both average gradients over the ranks; a step multiplies its loss by their number, so that what is added up is the
gradient of the whole batch's loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pmgaft.training.step import Passes


@dataclass(frozen=True, slots=True)
class Copies:
    """The student whole on every rank (DistributedDataParallel)."""

    passes: DistributedDataParallel

    def met(self, *, now: bool) -> AbstractContextManager[None]:
        """Gradients are added up in this backward, or stay with each rank until a later one."""
        quiet: AbstractContextManager[None] = nullcontext() if now else self.passes.no_sync()
        return quiet


@dataclass(frozen=True, slots=True)
class Shares:
    """The student in parts, gathered layer by layer while it runs (FSDP's fully_shard)."""

    passes: Any  # fully_shard makes the module's class one that is not known before

    def met(self, *, now: bool) -> AbstractContextManager[None]:
        """As above."""
        self.passes.set_requires_gradient_sync(now)
        return nullcontext()


def copies(passes: Passes, device: torch.device) -> Copies:
    """A student that each rank keeps whole."""
    ids = [device] if device.type == "cuda" else None
    return Copies(DistributedDataParallel(passes, device_ids=ids, gradient_as_bucket_view=True))


def shares(passes: Passes, device: torch.device) -> Shares:
    """A student that the ranks keep in parts; its parameters become DTensors, in place."""
    from torch.distributed.fsdp import fully_shard  # here: it takes seconds to import

    shard_blocks(passes.encoder, device)
    # A root is by default left gathered until a backward: after a forward without one, its weights would grow stale.
    return Shares(fully_shard(passes, mesh=_mesh(device), reshard_after_forward=True))


def shard_blocks(encoder: nn.Module, device: torch.device) -> None:
    """Split the repeated blocks of a tower, where nearly all of its weights are; the rest stays as it is."""
    from torch.distributed.fsdp import fully_shard

    mesh = _mesh(device)
    for block in reversed(list(_blocks(encoder))):  # inner ones first
        fully_shard(block, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or what all ranks' shares make together; then every rank must ask for it."""
    return tensor.full_tensor() if _is_shared(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def fill(tensor: Tensor, content: Tensor) -> None:
    """Write a whole tensor's content into a tensor, or each rank's share of it."""
    if _is_shared(tensor):
        from torch.distributed.tensor import distribute_tensor

        shared: Any = tensor
        content = distribute_tensor(content.to(shared.device), shared.device_mesh, shared.placements)
    tensor.copy_(content)


def _mesh(device: torch.device) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (torch.distributed.get_world_size(),))


def _blocks(module: nn.Module) -> Iterable[nn.Module]:
    """The members of every list of modules of one class, outer ones first."""
    for part in module.modules():
        children = list(part.children())
        if isinstance(part, nn.ModuleList | nn.Sequential) and len(children) > 1 and len(set(map(type, children))) == 1:
            yield from (child for child in children if any(True for _ in child.parameters()))


def _is_shared(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")
