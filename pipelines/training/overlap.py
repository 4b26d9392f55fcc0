"""Gradients averaged over the workers while backward still runs: torch's DDP around DeepSpeed's engine, at stage 0.

DeepSpeed itself averages at stage 0 only when backward has ended, and the network idles until then.
"""

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.training.objective import Batch, Gather
from pipelines.training.world import World

NS_PER_S = 1e9


class OverlappedAverage:
    """Calls a module whose gradients are, after backward, the mean over all ranks; every rank makes the same calls."""

    def __init__(self, module: nn.Module, world: World) -> None:
        self._averaged = DistributedDataParallel(
            _WithIdleParameter(module, world.device),
            process_group=_group_for_gradients(dist.group.WORLD),
            broadcast_buffers=False,
            init_sync=False,  # Every rank has built the same weights, and DeepSpeed has broadcast them.
            gradient_as_bucket_view=True,
            find_unused_parameters=True,
        )
        if world.device.type == "cpu":
            # On a GPU a sample waits for the device: there DDP takes one every hundred steps.
            self._averaged._set_ddp_runtime_logging_sample_rate(1)

    def __call__(self, batch: Batch, gather: Gather, *, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward pass; the backward pass after it averages if it is the `last` of the step, else it adds up here."""
        with nullcontext() if last else self._averaged.no_sync():
            return self._averaged(batch, gather)

    def waited_s(self) -> float | None:
        """Return the seconds of a backward pass in which this rank only waited for network and others, or None.

        Of the step before on a CPU, of DDP's last sample on a GPU; None before the first.
        """
        found: dict[str, Any] = self._averaged._get_ddp_logging_data()
        if "backward_comm_time" not in found:
            return None
        return (found["backward_comm_time"] - found["backward_compute_comm_overlap_time"]) / NS_PER_S

    def close(self) -> None:
        """Let go of the parameters."""
        del self._averaged


@cache
def _group_for_gradients(world: dist.ProcessGroup) -> Any:
    """Return a second group of all ranks, so that the collectives of a loss can come between those of DDP in any order.

    One for all trainings of a process: a rank that closes its connections early can tear those of a slower one.
    """
    return dist.new_group()


class _WithIdleParameter(nn.Module):
    """A module and a parameter that takes no part.

    DDP sorts its buckets anew after an attempt's first step, unless some parameter may be unused. Sums of three ranks
    and more would then be rounded in another order in a resumed run than in one that nothing interrupted. Where
    parameters may be unused and none is, DDP complains.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.module = module
        self.idle = nn.Parameter(torch.zeros(1, device=device))

    def forward(self, batch: Batch, gather: Gather) -> tuple[Tensor, dict[str, Tensor]]:
        return self.module(batch, gather)
