import torch

from models.conditions import Conditions
from models.mmdit import SIZES, MMDiT
from tests.models.mmdit_golden import fill_by_rule, relative_error, seeded


def _conditions(name: str, clips: int) -> Conditions:
    return Conditions(
        clip=seeded(f"{name} clip", (clips, 3, 8)),
        sync=seeded(f"{name} sync", (clips, 5, 8)),
        text=seeded(f"{name} text", (clips, 2, 8)),
        clip_global=seeded(f"{name} clip mean", (clips, 8)),
        text_global=seeded(f"{name} text mean", (clips, 8)),
    )


def test_joined_conditions_are_one_batch_and_those_of_one_clip_stand_for_all() -> None:
    ours, others, one = _conditions("ours", 2), _conditions("others", 2), _conditions("one", 1)
    for name, tensor in vars(ours).items():
        assert torch.equal(vars(ours.joined(others))[name], torch.cat([tensor, vars(others)[name]]))
        assert torch.equal(vars(ours.joined(one))[name], torch.cat([tensor, *[vars(one)[name]] * 2]))


def test_expanded_conditions_share_their_memory() -> None:
    one = _conditions("one", 1)
    for name, tensor in vars(one.expand(3)).items():
        assert tensor.shape == (3, *vars(one)[name].shape[1:])
        assert tensor.data_ptr() == vars(one)[name].data_ptr()


def test_fitted_statistics_standardise_hand_made_conditions_and_tame_their_spikes() -> None:
    tiny = MMDiT(SIZES["tiny"])
    fill_by_rule(tiny)
    config = SIZES["tiny"]
    latent = seeded("latent", (2, config.latent_len, config.latent_dim))
    clip_f = seeded("clip", (2, config.clip_len, config.clip_dim))
    sync_f = seeded("sync", (2, config.sync_len, config.sync_dim))
    text_f = seeded("text", (2, config.text_len, config.text_dim))
    t = torch.tensor([0.1, 0.9])
    plain = tiny(latent, clip_f, sync_f, text_f, t)
    statistics = tiny.condition_statistics
    assert statistics is not None
    clip, sync = statistics(clip_f, sync_f * 50)
    assert torch.equal(clip, clip_f)
    torch.testing.assert_close(sync.sinh(), sync_f * 50)
    assert sync.abs().max() < 7
    statistics.clip_mean.fill_(3.0)
    statistics.sync_std.fill_(0.5)
    shifted = tiny(latent, clip_f + 3.0, sync_f * 0.5, text_f, t)
    assert relative_error(shifted, plain) < 1e-4
