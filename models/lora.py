"""Low-rank adapters on the linear maps of an MM-DiT: fine-tuning with few trained weights, merged away on export.

LoRA (Hu et al. 2021, arXiv 2106.09685): y = W x + (alpha / r) B A x with W frozen, A [r, in] Kaiming-uniform and
B [out, r] zero, so the start is exactly the base. For a convolution A is a convolution of the same width and B acts
on each token, so that B A has the shape of W.

The low-rank path runs beside W, hooked to its module, and is no parametrization of W: then neither W + (alpha / r) B A
nor a gradient of W's size is ever made, and under bfloat16 autocast the small update is rounded by itself and not in a
sum with a large weight. The base keeps its parameters' names, and each adapter is a module of its own, called inside
the forward of the map it adapts, which is all that ZeRO-3 asks for.

Only adapters are trained. Biases, norms, the nulls and the position embedding stay the base's: they are what the base
learned from far more data, and a policy without its adapters must be the base, since preference training uses
it as the reference.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.layers import ChannelLastConv1d

ADAPTER = "adapter"
"""Name under which a map's module holds its adapter."""


class LowRank(nn.Module):
    """(alpha / r) B A x beside one map, float32; on (B, L, in) -> (B, L, out) or, beside a linear map, (..., in)."""

    def __init__(
        self, base: nn.Linear | ChannelLastConv1d, rank: int, alpha: float, generator: torch.Generator
    ) -> None:
        """A from `generator` (on the CPU: the same on every device), B zero; both on the device of `base`."""
        super().__init__()
        self.scale = alpha / rank
        self.active = True
        # On meta first: torch's own initialisation would draw from the global generator.
        with torch.device("meta"):
            if isinstance(base, ChannelLastConv1d):
                self.down = ChannelLastConv1d(base.in_channels, rank, base.kernel_size[0], bias=False)
                self.up = nn.Linear(rank, base.out_channels, bias=False)
            else:
                self.down = nn.Linear(base.in_features, rank, bias=False)
                self.up = nn.Linear(rank, base.out_features, bias=False)
        self.to_empty(device=base.weight.device)
        first = torch.empty(self.down.weight.shape)
        # a = sqrt(5), as torch's own linear layers: uniform in +-1 / sqrt(fan_in).
        nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            self.down.weight.copy_(first)
            self.up.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the map's output."""
        return self.scale * self.up(self.down(x))

    def beside(self, base: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add this adapter to the output of the map it belongs to: the map's forward hook."""
        return output + self(inputs[0]) if self.active else output

    def merged(self, weight: Tensor) -> Tensor:
        """W + (alpha / r) B A in W's shape and dtype; rounded once, and bit for bit W where nothing was learned."""
        down, up = self.down.weight.to(weight.device).double(), self.up.weight.to(weight.device).double()
        update = self.scale * (up @ down.flatten(1)).reshape(weight.shape)
        # Not the sum everywhere: it would turn -0 into 0.
        return torch.where(update == 0, weight, (weight.double() + update).to(weight.dtype))


def add_adapters(network: nn.Module, rank: int, alpha: float, seed: int) -> None:
    """Freeze a float32 network and put an adapter beside every linear map and every convolution over tokens.

    Args:
        network: the base; its forward stays bit for bit what it was until an adapter is trained.
        rank: r >= 1, the inner width of every adapter.
        alpha: the update is scaled by alpha / rank.
        seed: of the adapters' start.

    Raises:
        ValueError: the rank is below 1, the network is not float32, or it has adapters already.
    """
    if rank < 1:
        raise ValueError(f"the rank of an adapter must be at least 1, got {rank}")
    if adapters(network):
        raise ValueError("this network has adapters already; merge them first")
    if any(parameter.dtype != torch.float32 for parameter in network.parameters()):
        raise ValueError("adapters are trained beside float32 weights; cast the network back first")
    generator = torch.Generator().manual_seed(seed)
    network.requires_grad_(False)
    for base in list(network.modules()):
        if isinstance(base, nn.Linear | ChannelLastConv1d):
            adapter = LowRank(base, rank, alpha, generator)
            base.add_module(ADAPTER, adapter)
            base.register_forward_hook(adapter.beside)


def adapters(network: nn.Module) -> dict[str, LowRank]:
    """The adapters by the name of the map they stand beside; empty for a network without any."""
    suffix = f".{ADAPTER}"
    return {
        name.removesuffix(suffix): module for name, module in network.named_modules() if isinstance(module, LowRank)
    }


@contextmanager
def without_adapters(network: nn.Module) -> Iterator[None]:
    """Inside, the network is its base: nothing is computed for the adapters."""
    own = [adapter for adapter in adapters(network).values() if adapter.active]
    for adapter in own:
        adapter.active = False
    try:
        yield
    finally:
        for adapter in own:
            adapter.active = True


@torch.no_grad()
def merged_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain network that does what this one does: adapters merged, the base's names alone.

    Without adapters it is the network's own state dict.
    """
    found = adapters(network)
    merged: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and owner in found:
            merged[name] = found[owner].merged(tensor)
        elif f".{ADAPTER}." not in name:
            merged[name] = tensor
    return merged
