"""What one training process knows about the others: its rank, their number, and four collectives.

Objectives get `gather` handed in, so models never hear of ranks. With one rank every collective is the identity.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.training.stall import Pulse

Report = Callable[[int, dict[str, float]], None]
"""Told of progress: (step, metrics) by a training's rank 0, (rows done, nothing) by every rank that does units."""


class _GatherWithGradient(torch.autograd.Function):
    """all_gather along dim 0 whose backward sums the gradients that every rank has for this rank's part.

    When each rank computes the same loss from the gathered tensor and the engine averages gradients over ranks, the
    result is exactly the gradient of that loss on the whole batch.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        ctx.rows = tensor.shape[0]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.rows
        return total[start : start + ctx.rows]


@dataclass(frozen=True)
class World:
    """The ranks of one training; `device` is this rank's."""

    rank: int
    size: int
    device: torch.device
    pulse: Pulse = field(default_factory=Pulse, compare=False)
    """Where this rank is, for whoever watches that it does not hang."""
    most: int | None = None
    """Ranks of this group when it is whole; None where their number never changes."""

    @property
    def is_main(self) -> bool:
        """Rank 0 writes what is written once."""
        return self.rank == 0

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate a tensor [B, ...] of equal shape on all ranks to [world * B, ...], with gradient."""
        if self.size == 1:
            return tensor
        if not tensor.requires_grad:
            parts = [torch.empty_like(tensor) for _ in range(self.size)]
            dist.all_gather(parts, tensor.contiguous())
            return torch.cat(parts)
        gathered = _GatherWithGradient.apply(tensor)
        assert isinstance(gathered, Tensor)
        return gathered

    def mean(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Average scalars over all ranks; every rank gives the same names and gets the same values."""
        names = sorted(metrics)
        values = torch.stack([metrics[name].detach().double().reshape(()) for name in names]).to(self.device)
        if self.size > 1:
            dist.all_reduce(values)
        return {name: float(value) / self.size for name, value in zip(names, values.tolist(), strict=True)}

    def share(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def collect(self, value: Any) -> list[Any]:
        """Return the values of all ranks, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def average_buffers(self, module: torch.nn.Module) -> None:
        """Make floating buffers (batch-norm statistics) the mean over ranks, so that no rank's view is special."""
        if self.size == 1:
            return
        for buffer in module.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer.div_(self.size)
