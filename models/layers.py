"""Elementary layers of the MM-DiT: channel-last convolution, gated MLPs, RMS norm, modulation, time embedding.

Tensors are (B, L, channels) throughout: B batch, L tokens. Parameter names and shapes are those of the public MMAudio
checkpoints (arXiv 2412.15322), which is why the modules look exactly like this. Norms are evaluated in float32 whatever
the network's dtype, so that a bf16 network does not inherit bf16's machine epsilon.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

FFN_MULTIPLE = 256
"""Hidden widths of the gated MLPs are rounded up to a multiple of this."""


class ChannelLastConv1d(nn.Conv1d):
    """Conv1d over the tokens of (B, L, in) -> (B, L, out); stride 1, zero padding (k - 1) / 2."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, bias: bool = True) -> None:
        """`kernel_size` is odd, so that the length is kept."""
        assert kernel_size % 2 == 1, f"kernel_size must be odd to keep the length, got {kernel_size}"
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (B, L, in) along L."""
        return rearrange(super().forward(rearrange(input, "b l c -> b c l")), "b c l -> b l c")


def gated_hidden_dim(dim: int, mlp_ratio: int) -> int:
    """Hidden width of a gated MLP: two thirds of `mlp_ratio * dim`, rounded up to a multiple of 256."""
    two_thirds = 2 * mlp_ratio * dim // 3
    return -(-two_thirds // FFN_MULTIPLE) * FFN_MULTIPLE


class GatedMLP(nn.Module):
    """y = W2(SiLU(W1 x) * W3 x) without biases; with `kernel_size` the three maps are convolutions over tokens."""

    def __init__(self, dim: int, hidden_dim: int, kernel_size: int | None = None) -> None:
        """`kernel_size=None` gives linear maps, an odd number gives convolutions of that width."""
        super().__init__()

        def linear(in_dim: int, out_dim: int) -> nn.Module:
            if kernel_size is None:
                return nn.Linear(in_dim, out_dim, bias=False)
            return ChannelLastConv1d(in_dim, out_dim, kernel_size, bias=False)

        self.w1 = linear(dim, hidden_dim)
        self.w2 = linear(hidden_dim, dim)
        self.w3 = linear(dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, dim) -> (B, L, dim)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class HeadRMSNorm(nn.Module):
    """RMS norm over the channels of each head; returns float32, since rotary embedding follows in float32."""

    def __init__(self, head_dim: int) -> None:
        """One learned weight a channel, shared by all heads."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., head_dim) of any float dtype -> float32; eps is float32's machine epsilon."""
        eps = torch.finfo(torch.float32).eps
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), eps)


def layer_norm(x: Tensor) -> Tensor:
    """Layer norm over channels without learned parameters, eps 1e-5."""
    return F.layer_norm(x, (x.shape[-1],), eps=1e-5)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm's second half: x * (1 + scale) + shift, for x (B, L, D) and modulations (S, L or 1, D).

    S divides B: every modulation serves the B / S consecutive samples of one condition, and is not repeated for them.
    """
    grouped = rearrange(x, "(s n) l d -> s n l d", s=shift.shape[0])
    modulated = torch.addcmul(shift[:, None], grouped, 1 + scale[:, None])
    return rearrange(modulated, "s n l d -> (s n) l d")


def add_gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """Residual sum x + gate * branch, for x and branch (B, L, D) and a gate (S, L or 1, D), shared as in `modulate`."""
    grouped, branch = (rearrange(part, "(s n) l d -> s n l d", s=gate.shape[0]) for part in (x, branch))
    return rearrange(torch.addcmul(grouped, gate[:, None], branch), "s n l d -> (s n) l d")


class Modulation(nn.Sequential):
    """Condition -> `num_chunks` vectors (shift, scale, gate, ...): Linear(SiLU(condition)), split along channels."""

    def __init__(self, dim: int, num_chunks: int) -> None:
        """The linear map is entry 1 of the sequence, as its checkpoint name `adaLN_modulation.1` says."""
        super().__init__(nn.SiLU(), nn.Linear(dim, num_chunks * dim))
        self.num_chunks = num_chunks

    def chunks(self, condition: Tensor) -> tuple[Tensor, ...]:
        """(B, L or 1, dim) -> `num_chunks` tensors of that shape."""
        return self(condition).chunk(self.num_chunks, dim=-1)


class TimeEmbedding(nn.Module):
    """Flow time in [0, 1] -> a vector: cosines and sines at geometric frequencies, then a two-layer MLP.

    The time is not stretched to 1000. v1 (`max_period=10000`): frequencies from 1 down to 1e-4; v2 (`max_period=1`):
    from 1e4 down to 1, angles reach 1e4 rad, so the frequencies are rounded in a fixed order, on the CPU and in
    float32, whatever device and dtype the network has.
    """

    def __init__(self, dim: int, frequency_dim: int, max_period: int) -> None:
        """`frequency_dim` (even) sinusoidal features -> `dim`; `max_period` is 10000 (v1) or 1 (v2)."""
        super().__init__()
        assert frequency_dim % 2 == 0, f"frequency_dim must be even, got {frequency_dim}"
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.frequency_dim = frequency_dim
        self.max_period = max_period

    def frequencies(self) -> Tensor:
        """Angular frequencies [frequency_dim / 2], float32 on the CPU; power first, then reciprocal, then factor."""
        exponents = torch.arange(0, self.frequency_dim, 2, dtype=torch.float32, device="cpu") / self.frequency_dim
        return (1.0 / (10_000**exponents)) * (10_000 / self.max_period)

    def forward(self, t: Tensor) -> Tensor:
        """Times [B] -> (B, dim) in the dtype of the MLP's weights."""
        angles = t.float()[:, None] * self.frequencies().to(t.device)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        first: nn.Linear = self.mlp[0]  # type: ignore[assignment]
        return self.mlp(features.to(first.weight.dtype))


def nearest_exact_upsample(x: Tensor, length: int) -> Tensor:
    """Repeat tokens of (B, L, C) to (B, length, C) as torch's "nearest-exact" does on the CPU.

    The source of target n is floor((n + 0.5) * s), s = L / length rounded to float32 and the product in float32: at
    L = 192 and length = 345 two tokens (n = 57, 172) differ from exact arithmetic, and the public weights were trained
    so. Computed here, and not by `F.interpolate`, so that every device agrees.
    """
    scale = torch.tensor(x.shape[1], dtype=torch.float32) / torch.tensor(length, dtype=torch.float32)
    targets = torch.arange(length, dtype=torch.float32, device=x.device) + 0.5
    source = (targets * scale.item()).floor().long().clamp_(max=x.shape[1] - 1)
    return x.index_select(1, source)
