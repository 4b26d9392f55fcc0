import pytest
import torch

from pipelines.errors import InputError
from pipelines.preferences.distortions import DISTORTIONS, distort

DURATION_S = 2.5
TOKENS = 40
RATE_HZ = TOKENS / DURATION_S


def latents() -> torch.Tensor:
    """Every token tells its own position."""
    return torch.arange(TOKENS, dtype=torch.float32)[:, None].expand(TOKENS, 3).contiguous()


@pytest.mark.parametrize("name", list(DISTORTIONS))
@pytest.mark.parametrize("seed", range(30))
def test_a_distortion_only_moves_whole_tokens(name, seed):
    result = DISTORTIONS[name](latents(), RATE_HZ, torch.Generator().manual_seed(seed))
    assert result.shape == (TOKENS, 3)
    assert not torch.equal(result, latents())
    assert {tuple(row) for row in result.tolist()} <= {tuple(row) for row in latents().tolist()}


@pytest.mark.parametrize("seed", range(30))
def test_a_roll_moves_everything_by_half_a_second_or_more_in_either_direction(seed):
    result = DISTORTIONS["roll"](latents(), RATE_HZ, torch.Generator().manual_seed(seed))[:, 0]
    shift = int(result.argmin())
    assert min(shift, TOKENS - shift) / RATE_HZ >= 0.5
    assert torch.equal(result, torch.roll(latents()[:, 0], shift))


@pytest.mark.parametrize("seed", range(30))
def test_a_swap_exchanges_two_segments_and_leaves_the_rest(seed):
    source = latents()[:, 0]
    result = DISTORTIONS["swap"](latents(), RATE_HZ, torch.Generator().manual_seed(seed))[:, 0]
    moved = (result != source).nonzero().flatten().tolist()
    assert sorted(result.tolist()) == source.tolist()
    assert len(moved) % 2 == 0
    assert len(moved) / 2 / RATE_HZ >= 0.5
    first, second = moved[: len(moved) // 2], moved[len(moved) // 2 :]
    assert result[first].tolist() == source[second].tolist()
    assert result[second].tolist() == source[first].tolist()


@pytest.mark.parametrize("seed", range(30))
def test_a_stretch_keeps_order_and_ends_and_moves_something_by_an_audible_time(seed):
    result = DISTORTIONS["stretch"](latents(), RATE_HZ, torch.Generator().manual_seed(seed))[:, 0]
    assert (result.diff() >= 0).all()
    assert result[0] <= 1
    assert result[-1] >= TOKENS - 2
    assert (result - latents()[:, 0]).abs().max() / RATE_HZ > 0.1


def test_the_same_seed_distorts_in_the_same_way_and_all_kinds_occur():
    names = set()
    for seed in range(30):
        name, result = distort(latents(), DURATION_S, torch.Generator().manual_seed(seed))
        again = distort(latents(), DURATION_S, torch.Generator().manual_seed(seed))
        assert again[0] == name
        assert torch.equal(again[1], result)
        names.add(name)
    assert names == set(DISTORTIONS)


def test_a_clip_too_short_to_distort_is_refused():
    with pytest.raises(InputError, match="too short"):
        distort(latents()[:10], 0.6, torch.Generator())
