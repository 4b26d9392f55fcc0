"""The acceptance gates: known answers of each measure; a reward that matches passes, an untrained one fails."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from models.reward import Calibration, RawParts, Reward, VideoFeatures
from models.sf_cavp import SF_CAVP_SIZES, SFCAVP, Streams
from pipelines.evaluation.gates import Gate, auc, ground_truth_shares, measure, preferred_share, retrieval


def test_retrieval_finds_what_is_there_and_chance_finds_one_in_thirty_two() -> None:
    rng = np.random.default_rng(0)
    assert retrieval([np.eye(32)] * 2).video_to_audio_r1 == 1
    assert retrieval([-np.eye(32)] * 2).audio_to_video_r1 == 0
    chance = retrieval(list(rng.standard_normal((200, 32, 32))))
    assert chance.group_size == 32
    assert chance.video_to_audio_r1 == pytest.approx(1 / 32, abs=0.01)
    assert chance.audio_to_video_r10 == pytest.approx(10 / 32, abs=0.03)


def test_the_two_directions_of_retrieval_are_told_apart_and_a_tie_is_not_found() -> None:
    found = retrieval([np.array([[1.0, 1.0], [0.8, 0.8]])])
    assert (found.video_to_audio_r1, found.audio_to_video_r1) == (0.0, 0.5)


def test_auc_is_the_chance_of_the_right_order() -> None:
    assert auc(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1
    assert auc(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 0
    assert auc(np.array([1.0, 1.0]), np.array([1.0])) == 0.5
    assert auc(np.array([1.0, 3.0]), np.array([0.0, 2.0])) == 0.75


def test_shares_count_ties_half_and_leave_out_what_has_no_score() -> None:
    assert preferred_share(np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0, 4.0])) == 0.5
    candidates = np.array([[0.0, 2.0], [np.nan, 0.5], [np.nan, np.nan]])
    assert ground_truth_shares(np.array([1.0, 1.0, 1.0]), candidates) == (1.0, 0.5)
    assert math.isnan(ground_truth_shares(np.array([1.0]), np.full((1, 2), np.nan))[0])


def test_a_value_that_is_not_known_passes_no_bar() -> None:
    assert Gate(name="x", value=0.9, bar=0.85).passed
    assert not Gate(name="x", value=0.8, bar=0.85).passed
    assert not Gate(name="x", value=math.nan, bar=0.85).passed
    assert Gate(name="x", value=math.nan, bar=None).passed
    assert Gate(name="x", value=0.001, bar=0.01, at_most=True).passed


class LoudnessReward(Reward):
    """A reward that is right by construction: the brightness of each frame is the loudness of its sixteenth second."""

    def video_features(self, frames: Tensor) -> VideoFeatures:
        fast = frames.mean(dim=(2, 3, 4))[0]
        return VideoFeatures(Streams(fast[None, None], (fast - fast.mean())[None, :, None]), (0,))

    def sound_features(self, waves: Tensor, sample_rate_hz: int, video: VideoFeatures) -> Streams:
        loud = waves.reshape(len(waves), -1, sample_rate_hz // 16).abs().mean(dim=2)
        loud = loud / loud.mean(dim=1, keepdim=True)
        return Streams(loud[:, None], (loud - loud.mean(dim=1, keepdim=True))[:, :, None])

    def compare(self, video: VideoFeatures, sound: Streams) -> RawParts:
        a, b = video.streams.fast[..., 0], sound.fast[..., 0]
        match = torch.nn.functional.cosine_similarity(a, b, dim=1)[:, None]
        return RawParts(match, match, torch.zeros(len(b)))


def pairs(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor, int]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        level = 0.05 + 0.3 * torch.rand(40, generator=generator)
        carrier = torch.sin(torch.arange(40_000) * 0.9)
        frames = level[None, :, None, None, None].expand(1, -1, 3, 32, 32)
        made.append((frames, (level.repeat_interleave(1000) * carrier)[None], 16_000))
    return made


def unit_calibration() -> Calibration:
    return Calibration(semantic_mean=0, semantic_std=1, temporal_mean=0, temporal_std=1, num_pairs=2)


def test_a_reward_that_matches_passes_every_gate() -> None:
    reward = LoudnessReward(SFCAVP(SF_CAVP_SIZES["tiny"]), "tiny", unit_calibration())
    report = measure(reward, [*pairs(40), (torch.zeros(1, 40, 3, 32, 32), torch.zeros(1, 40_000), 16_000)])
    assert (report.num_clips, report.num_unusable) == (40, 1)
    assert report.value("auc_mismatched") == 1
    assert report.value("shift_acc_125ms") == 1
    assert report.value("gain_change") < 1e-4
    assert report.passed
    assert report.to_json()["passed"] is True


def test_an_untrained_reward_is_not_accepted() -> None:
    torch.manual_seed(0)
    model = SFCAVP(SF_CAVP_SIZES["tiny"])
    made = pairs(8)
    model.fit(torch.cat([frames for frames, _, _ in made]), torch.cat([wave for _, wave, _ in made]))
    report = measure(Reward.calibrated(model, "tiny", made), made)
    assert not report.passed
    assert report.value("gain_change") < 0.01


def test_one_clip_is_too_few_for_the_gates() -> None:
    reward = LoudnessReward(SFCAVP(SF_CAVP_SIZES["tiny"]), "tiny", unit_calibration())
    with pytest.raises(ValueError, match="at least 2 clips"):
        measure(reward, pairs(1))
