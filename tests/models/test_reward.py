"""The reward: gain does not buy it, faults do not get one, and it is the same whatever else is scored beside."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.reward import Calibration, Reward, invalid_reason, window_starts
from models.sf_cavp import SF_CAVP_SIZES, SFCAVP
from models.slowfast import FittedNorm
from models.weights import load_config, save_config

RATE_HZ = 16_000


def clip(seed: int, num_frames: int = 40) -> tuple[Tensor, Tensor]:
    """Random picture and sound of one clip: frames [1, T, 3, 32, 32], wave [1, S] well below full scale."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.rand(1, num_frames, 3, 1, 1, generator=generator).expand(-1, -1, -1, 32, 32)
    loudness = torch.rand(1, num_frames, generator=generator).repeat_interleave(1000, dim=1)
    wave = 0.1 * loudness * torch.randn(1, num_frames * 1000, generator=generator).clamp(-3, 3)
    return frames, wave


@pytest.fixture(scope="module")
def reward() -> Reward:
    torch.manual_seed(0)
    model = SFCAVP(SF_CAVP_SIZES["tiny"])
    for module in model.modules():
        if isinstance(module, FittedNorm) and module.weight is not None:
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    clips = [clip(seed) for seed in range(8)]
    model.fit(torch.cat([frames for frames, _ in clips]), torch.cat([wave for _, wave in clips]))
    return Reward.calibrated(model, "tiny", [(frames, wave, RATE_HZ) for frames, wave in clips])


def test_the_real_pairs_of_the_calibration_have_mean_nought_and_spread_one_in_each_part(reward) -> None:
    scores = [reward.score(reward.video_features(f), w, RATE_HZ)[0] for f, w in map(clip, range(8))]
    c = reward.calibration
    assert c.num_pairs == 8
    for values, mean, std in (
        ([s.semantic for s in scores], c.semantic_mean, c.semantic_std),
        ([s.temporal for s in scores], c.temporal_mean, c.temporal_std),
    ):
        standard = (torch.tensor(values, dtype=torch.float64) - mean) / std
        assert standard.mean().item() == pytest.approx(0, abs=1e-4)
        assert standard.std().item() == pytest.approx(1, abs=1e-4)
    for s in scores:
        by_hand = 0.5 * (s.semantic - c.semantic_mean) / c.semantic_std
        by_hand += 0.5 * (s.temporal - c.temporal_mean) / c.temporal_std
        assert s.total == pytest.approx(by_hand, abs=1e-4)


@pytest.mark.parametrize("gain_db", [-6.0, 6.0])
def test_gain_does_not_change_the_reward(reward, gain_db) -> None:
    frames, wave = clip(20)
    video = reward.video_features(frames)
    plain, changed = (reward.score(video, w, RATE_HZ)[0] for w in (wave, wave * 10 ** (gain_db / 20)))
    assert changed.valid
    assert changed.semantic == pytest.approx(plain.semantic, abs=1e-5)
    assert changed.temporal == pytest.approx(plain.temporal, abs=1e-5)
    assert changed.total == pytest.approx(plain.total, abs=1e-3)


def test_scores_do_not_depend_on_what_is_scored_beside_and_repeat_exactly(reward) -> None:
    video = reward.video_features(clip(20)[0])
    waves = torch.cat([clip(seed)[1] for seed in range(20, 24)])
    together = reward.score(video, waves, RATE_HZ)
    assert together == reward.score(video, waves, RATE_HZ)
    alone = [reward.score(video, waves[i : i + 1], RATE_HZ)[0] for i in range(4)]
    for one, other in zip(together, alone, strict=True):
        assert one.total == pytest.approx(other.total, abs=1e-4)
    assert len({round(score.total, 4) for score in together}) == 4


def test_faulty_sounds_are_refused_each_with_its_reason_and_the_others_are_scored(reward) -> None:
    frames, wave = clip(20)
    silent, clipped, broken = torch.zeros_like(wave), (wave * 100).clamp(-1, 1), wave.clone()
    broken[0, 7] = math.nan
    scores = reward.score(reward.video_features(frames), torch.cat([silent, wave, clipped, broken]), RATE_HZ)
    assert [s.invalid_reason for s in scores] == ["silent", None, "clipped", "nonfinite"]
    assert [s.valid for s in scores] == [False, True, False, False]
    assert math.isnan(scores[0].total)
    assert math.isfinite(scores[1].total)
    assert scores[1].total == pytest.approx(
        reward.score(reward.video_features(frames), wave, RATE_HZ)[0].total, abs=1e-4
    )


def test_the_guards_stand_where_the_specification_puts_them() -> None:
    tone = torch.sin(torch.arange(16_000) * 0.3)
    assert invalid_reason(tone * math.sqrt(2) * 1.05e-3) is None
    assert invalid_reason(tone * math.sqrt(2) * 0.95e-3) == "silent"
    few = tone * 0.5
    few[:15] = 1.0
    assert invalid_reason(few) is None
    few[:18] = -1.0
    assert invalid_reason(few) == "clipped"
    assert invalid_reason(torch.full((10,), math.inf)) == "nonfinite"


def test_all_faulty_sounds_are_refused_without_a_network(reward) -> None:
    scores = reward.score(reward.video_features(clip(20)[0]), torch.zeros(3, 40_000), RATE_HZ)
    assert [s.invalid_reason for s in scores] == ["silent"] * 3


def test_long_clips_are_the_mean_of_four_second_windows_and_name_the_worst(reward) -> None:
    assert window_starts(40) == window_starts(64) == (0,)
    assert window_starts(128) == (0, 32, 64)
    assert window_starts(144) == (0, 32, 64, 80)
    frames, wave = clip(30, num_frames=144)
    whole = reward.score(reward.video_features(frames), wave, RATE_HZ)[0]
    rms = wave.square().mean().sqrt()
    parts = []
    for start in (0, 32, 64, 80):
        window = wave[:, start * 1000 : (start + 64) * 1000]
        # The level is the whole clip's, so a window alone has to be brought to it by the same gain.
        window = window * (0.05 / rms)
        video = reward.video_features(frames[:, start : start + 64])
        with torch.no_grad():
            parts.append(reward.compare(video, reward.model.encode_audio(window)))
    totals = [float(reward.calibration.total(p.semantic, p.temporal)) for p in parts]
    assert whole.total == pytest.approx(sum(totals) / 4, abs=1e-3)
    assert whole.worst_window == pytest.approx(min(totals), abs=1e-3)


def test_a_sound_at_another_rate_is_resampled_and_a_short_one_is_refused(reward) -> None:
    frames, _ = clip(20)
    video = reward.video_features(frames)
    t = torch.arange(2.5 * 48_000) / 48_000
    chirp = 0.3 * torch.sin(2 * math.pi * (300 + 400 * t) * t)[None] * (1 + torch.sin(20 * t))
    high, low = reward.score(video, chirp, 48_000)[0], reward.score(video, chirp[:, ::3], 16_000)[0]
    assert high.total == pytest.approx(low.total, abs=0.05)
    with pytest.raises(ValueError, match=r"lasts 2.00 s, the picture 2.50 s"):
        reward.score(video, 0.1 * torch.randn(1, 32_000), RATE_HZ)


def test_a_reward_survives_saving_bit_for_bit(reward, tmp_path: Path) -> None:
    assert reward.save(tmp_path) == ["config.json", "sf_cavp.safetensors"]
    loaded = Reward.load(tmp_path)
    assert loaded.calibration == reward.calibration
    frames, wave = clip(20)
    assert loaded.score(loaded.video_features(frames), wave, RATE_HZ) == reward.score(
        reward.video_features(frames), wave, RATE_HZ
    )
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_a_damaged_checkpoint_says_what_is_wrong(reward, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config.json"):
        Reward.load(tmp_path)
    reward.save(tmp_path)
    config = load_config(tmp_path / "config.json", "sf_cavp")
    save_config(tmp_path / "config.json", config | {"size": "huge"})
    with pytest.raises(ValueError, match="huge"):
        Reward.load(tmp_path)
    save_config(tmp_path / "config.json", {name: value for name, value in config.items() if name != "parts"})
    with pytest.raises(ValueError, match="calibrated for other parts than this code has; train it again"):
        Reward.load(tmp_path)
    save_config(tmp_path / "config.json", config | {"calibration": {"semantic_mean": 0.0}})
    with pytest.raises(ValueError, match="calibration"):
        Reward.load(tmp_path)


def test_a_calibration_needs_pairs_that_can_be_judged_and_that_differ(reward) -> None:
    frames, wave = clip(0)
    with pytest.raises(ValueError, match="at least 2"):
        Reward.calibrated(reward.model, "tiny", [(frames, wave, RATE_HZ), (frames, wave * 0, RATE_HZ)])
    with pytest.raises(ValueError, match="do not vary"):
        Reward.calibrated(reward.model, "tiny", [(frames, wave, RATE_HZ)] * 3)


def test_weights_decide_between_the_parts() -> None:
    even = Calibration(semantic_mean=0.5, semantic_std=0.1, temporal_mean=0.2, temporal_std=0.4, num_pairs=9)
    assert even.total(torch.tensor(0.6), torch.tensor(0.6)).item() == pytest.approx(1.0)
    only_semantic = dataclasses.replace(even, semantic_weight=1.0, temporal_weight=0.0)
    assert only_semantic.total(torch.tensor(0.7), torch.tensor(9.0)).item() == pytest.approx(2.0)
