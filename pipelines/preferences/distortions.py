"""Ground-truth latents made wrong in time: the losers of `gt_vs_distorted`, which cost no sampling.

Every distortion only moves whole latent tokens, it never blends or scales them: each token of the result is
a token of the original, so a policy cannot tell winner from loser by a codec artefact or by changed
statistics, only by when things sound. The list is ours (the idea of rule-made temporal losers is SyncDPO's,
arXiv 2605.12179).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pipelines.errors import InputError

MIN_SHIFT_S = 0.5
"""Least time by which a roll or a swap moves sound, in seconds."""
MIN_STRETCH_WINDOW_S = 1.0
"""Least length of the window that a stretch warps, in seconds."""
STRETCH_MOVE = (0.15, 0.25)
"""Least and greatest share of its window by which a stretch moves the window's middle."""


def _randint(low: int, high: int, generator: torch.Generator) -> int:
    """A uniform integer in [low, high]."""
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def roll(latents: Tensor, token_rate_hz: float, generator: torch.Generator) -> Tensor:
    """Roll [N, C] in a circle by at least `MIN_SHIFT_S` either way."""
    num_tokens = latents.shape[0]
    least = _tokens(MIN_SHIFT_S, token_rate_hz)
    return torch.roll(latents, _randint(least, num_tokens - least, generator), dims=0)


def swap_segments(latents: Tensor, token_rate_hz: float, generator: torch.Generator) -> Tensor:
    """Exchange two disjoint segments of [N, C], each at least `MIN_SHIFT_S` long; the rest stays in
    place."""
    num_tokens = latents.shape[0]
    least = _tokens(MIN_SHIFT_S, token_rate_hz)
    length = _randint(least, max(least, num_tokens // 3), generator)
    first = _randint(0, num_tokens - 2 * length, generator)
    second = _randint(first + length, num_tokens - length, generator)
    swapped = latents.clone()
    swapped[first : first + length] = latents[second : second + length]
    swapped[second : second + length] = latents[first : first + length]
    return swapped


def stretch(latents: Tensor, token_rate_hz: float, generator: torch.Generator) -> Tensor:
    """Slow down one part of a window of [N, C] and hurry the other, so that the clip keeps its length.

    The window's middle moves by a share of the window within `STRETCH_MOVE`; tokens are picked by nearest
    index.
    """
    num_tokens = latents.shape[0]
    window = _randint(_tokens(MIN_STRETCH_WINDOW_S, token_rate_hz), num_tokens, generator)
    start = _randint(0, num_tokens - window, generator)
    least, most = STRETCH_MOVE
    move = least + (most - least) * float(torch.rand(1, generator=generator))
    middle = 0.5 + move * (1 if _randint(0, 1, generator) else -1)
    position = (torch.arange(window, dtype=torch.float64) + 0.5) / window
    before = position * (0.5 / middle)
    after = 0.5 + (position - middle) * (0.5 / (1 - middle))
    source = torch.where(position < middle, before, after)
    index = torch.arange(num_tokens)
    index[start : start + window] = start + (source * window).long().clamp(0, window - 1)
    return latents[index.to(latents.device)]


DISTORTIONS: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "roll": roll,
    "swap": swap_segments,
    "stretch": stretch,
}
"""Every distortion by name: (latents [N, C], tokens a second, generator) -> latents [N, C]."""


def distort(latents: Tensor, duration_s: float, generator: torch.Generator) -> tuple[str, Tensor]:
    """Distort [N, C] in one randomly chosen way; return the distortion's name and the result (same shape,
    type).

    Random numbers come from `generator` (CPU) alone. Raises InputError where the clip is too short (< 1 s)
    for sound to move by `MIN_SHIFT_S` both ways.
    """
    token_rate_hz = latents.shape[0] / duration_s
    if latents.shape[0] < 2 * _tokens(MIN_SHIFT_S, token_rate_hz):
        raise InputError(
            f"gt_vs_distorted: a clip of {duration_s} s is too short to distort (needs {2 * MIN_SHIFT_S} s); "
            "use another --mode"
        )
    name = list(DISTORTIONS)[_randint(0, len(DISTORTIONS) - 1, generator)]
    return name, DISTORTIONS[name](latents, token_rate_hz, generator)


def _tokens(seconds: float, token_rate_hz: float) -> int:
    """Whole tokens that last at least `seconds`."""
    return math.ceil(seconds * token_rate_hz)
