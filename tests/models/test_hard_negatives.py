"""Wrong sounds: every kind of edit does what its name says, changes what it should and leaves the rest."""

import math

import pytest
import torch
from torch import Tensor

from models.hard_negatives import (
    BACKGROUND_DRAWS,
    EDIT_DRAWS,
    EDITS,
    FLOOR,
    add_background,
    apply_gain,
    edit_sound,
    join_two_clips,
    mix_power,
    partner,
)

QUIET = math.log(FLOOR)


def sounds(num_clips: int = 4) -> Tensor:
    """Log-mels [B, 64, 96] with one loud patch each, at another place for every clip."""
    log_mel = torch.full((num_clips, 64, 96), QUIET + 0.5)
    for i in range(num_clips):
        log_mel[i, 8 * i + 4 : 8 * i + 12, 20 * i + 10 : 20 * i + 22] = 0.0
    return log_mel


def draws(kind: str, num_clips: int = 4, **chosen: float) -> Tensor:
    u = torch.full((num_clips, EDIT_DRAWS), 0.5)
    u[:, 0] = (EDITS.index(kind) + 0.5) / len(EDITS)
    for index, value in chosen.items():
        u[:, int(index[1:])] = value
    return u


def test_every_kind_of_edit_is_drawn_and_changes_real_sound() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(210, 64, 96, generator=generator) * 2 - 4
    u = torch.rand(210, EDIT_DRAWS, generator=generator)
    edited = edit_sound(x, u)
    kinds = (u[:, 0] * len(EDITS)).long()
    assert set(kinds.tolist()) == set(range(len(EDITS)))
    assert torch.isfinite(edited.log_mel).all()
    for kind in range(len(EDITS)):
        assert edited.is_wrong[kinds == kind].float().mean() > 0.5, EDITS[kind]


def test_an_exchange_takes_a_stretch_from_the_partner_alone() -> None:
    x = sounds()
    edited = edit_sound(x, draws("exchange", u1=0.0)).log_mel  # all bands, a stretch of time
    from_partner = (edited == partner(x)).all(dim=1)
    from_self = (edited == x).all(dim=1)
    assert (from_partner | from_self).all()
    assert (edited != x).any(dim=(1, 2)).any()


def test_a_fade_only_takes_away() -> None:
    x = sounds()
    edited = edit_sound(x, draws("fade", u1=0.9, u4=0.99, u5=0.0)).log_mel
    assert (edited <= x).all()
    assert (edited < x).any()


def test_a_move_is_a_shift_of_62_to_250_ms() -> None:
    x = sounds(2)
    for u, steps in ((0.0, 4), (0.499, 16), (0.5, -4), (0.999, -16)):
        edited = edit_sound(x, draws("move", 2, u6=u, u7=0.0)).log_mel
        assert torch.equal(edited[:, :, 20:70], x[:, :, 20 - steps : 70 - steps])


def test_a_double_keeps_the_sound_and_adds_its_transposition() -> None:
    x = sounds(1)
    edited = edit_sound(x, draws("double", 1, u1=0.9, u4=1.0, u5=0.0, u6=0.0, u7=0.0)).log_mel
    assert (edited >= x - 1e-4).all()
    assert (edited > x + 0.1).any()


def test_swapped_halves_are_swapped_halves() -> None:
    x = sounds()
    edited = edit_sound(x, draws("swap")).log_mel
    assert torch.equal(edited, torch.cat([x[..., 48:], x[..., :48]], dim=-1))


def test_silence_for_silence_is_not_wrong() -> None:
    silent = torch.full((4, 64, 96), QUIET)
    for kind in EDITS:
        assert not edit_sound(silent, draws(kind)).is_wrong.any()


def test_power_adds_up_and_gain_is_undone_by_its_inverse() -> None:
    x = sounds()
    twice = mix_power(x, x, torch.zeros(()))
    torch.testing.assert_close(twice.exp() - FLOOR, 2 * (x.exp() - FLOOR), rtol=1e-3, atol=1e-6)
    gain_db = torch.tensor([6.0, -6.0, 3.0, 0.0])
    torch.testing.assert_close(apply_gain(apply_gain(x, gain_db), -gain_db), x, atol=1e-2, rtol=0)


def test_a_background_is_faint_and_leaves_events() -> None:
    x = sounds()
    u = torch.rand(4, BACKGROUND_DRAWS, generator=torch.Generator().manual_seed(0))
    u[:, 0] = torch.tensor([0.0, 0.3, 0.6, 1.0])
    y = add_background(x, u)
    assert (y >= x).all()
    torch.testing.assert_close(y[x == 0], x[x == 0], atol=0.1, rtol=0)
    added = (y - x).mean(dim=(1, 2))
    assert added[0] < added[1] < added[2] < added[3]


def test_two_clips_are_cut_at_the_same_time_in_picture_and_sound() -> None:
    frames = torch.arange(4.0).reshape(4, 1, 1, 1, 1).expand(4, 40, 3, 8, 8) / 4
    log_mel = torch.arange(4.0).reshape(4, 1, 1).expand(4, 64, 160)
    u = torch.tensor([[0.01, 0.3, 0.5, 0.5]] * 4)
    joined_frames, joined_mel = join_two_clips(frames, log_mel, u, torch.full((4,), 0.3))
    seen, heard = joined_frames[0, :, 0, 0, 0] * 4, joined_mel[0, 0]
    assert set(seen.tolist()) == {0.0, 2.0}
    assert torch.equal(seen.repeat_interleave(4), heard)
    assert 0.3 <= (seen == 0).float().mean() <= 0.7


def test_two_clips_side_by_side_are_both_seen_and_both_heard() -> None:
    frames = torch.zeros(4, 40, 3, 8, 8)
    frames[2:] = 1.0
    x = sounds()
    joined_frames, joined_mel = join_two_clips(
        frames, x[..., :80], torch.tensor([[0.2, 0.5, 0.0, 0.5]] * 4), torch.full((4,), 0.3)
    )
    assert joined_frames[0, :, :, :, :4].max() == 0
    assert joined_frames[0, :, :, :, 4:].min() == 1
    torch.testing.assert_close(joined_mel[0], mix_power(x[0, :, :80], x[2, :, :80], torch.zeros(())))


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_joining_keeps_to_its_probability(probability) -> None:
    generator = torch.Generator().manual_seed(0)
    frames, x = torch.rand(8, 40, 3, 8, 8, generator=generator), torch.randn(8, 64, 160, generator=generator)
    joined, _ = join_two_clips(frames, x, torch.rand(8, 4, generator=generator), torch.full((8,), probability))
    changed = (joined != frames).any(dim=(1, 2, 3, 4))
    assert changed.float().mean() == probability


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_partner_is_the_same_for_any_number_of_ranks(world) -> None:
    """Position p goes to rank p mod world; each rank's partners are those of the global batch."""
    positions = torch.arange(16)
    expected = dict(zip(positions.tolist(), partner(positions).tolist(), strict=True))
    for rank in range(world):
        mine = positions[rank::world]
        assert {int(p): int(q) for p, q in zip(mine, partner(mine), strict=True)} == {
            int(p): expected[int(p)] for p in mine
        }
