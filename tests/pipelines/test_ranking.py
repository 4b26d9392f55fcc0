import math

import numpy as np
import pytest
import torch

from models.codec import build_codec
from models.reward import Calibration, Reward, RewardScore
from models.sf_cavp import SF_CAVP_SIZES, SFCAVP
from models.spec import SPECS
from pipelines.data.demo_world import render_clip
from pipelines.preferences.ranking import Ranker, as_contenders, reward_struct

TINY = SPECS["tiny"]


@pytest.fixture(scope="module")
def ranker() -> Ranker:
    torch.manual_seed(0)
    unit = Calibration(semantic_mean=0, semantic_std=1, temporal_mean=0, temporal_std=1, num_pairs=2)
    reward = Reward(SFCAVP(SF_CAVP_SIZES["tiny"]), "tiny", unit)
    return Ranker(reward, build_codec("tiny"), TINY.sample_rate_hz, torch.device("cpu"))


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    waves = torch.stack([torch.from_numpy(render_clip(3, index).wave) for index in range(3)])
    return build_codec("tiny").encode(waves)[0]


def score(total: float, valid: bool = True) -> RewardScore:
    return RewardScore(
        total=total,
        semantic=total,
        temporal=total,
        offset_s=0.0,
        valid=valid,
        invalid_reason=None if valid else "silent",
    )


def test_scores_come_in_order_and_do_not_depend_on_the_company(ranker: Ranker, latents: torch.Tensor) -> None:
    video = ranker.look(render_clip(3, 0).frames)
    together = ranker.score(video, latents)
    for index, found in enumerate(together):
        assert found.valid
        alone = ranker.score(video, latents[index : index + 1])[0]
        assert found.total == pytest.approx(alone.total, abs=1e-4)
    assert len({found.total for found in together}) == 3


def test_a_candidate_that_is_not_finite_is_invalid_and_harms_no_other(ranker: Ranker, latents: torch.Tensor) -> None:
    video = ranker.look(render_clip(3, 0).frames)
    spoilt = latents.clone()
    spoilt[1, 5, 7] = math.nan
    found = ranker.score(video, spoilt)
    assert [entry.valid for entry in found] == [True, False, True]
    assert found[1].invalid_reason == "nonfinite"
    clean = ranker.score(video, latents[[0, 2]])
    assert [found[0].total, found[2].total] == [clean[0].total, clean[1].total]


def test_nothing_finite_means_nothing_valid(ranker: Ranker, latents: torch.Tensor) -> None:
    video = ranker.look(render_clip(3, 0).frames)
    assert [entry.valid for entry in ranker.score(video, latents * math.inf)] == [False] * 3


def test_silence_is_refused_by_the_reward(ranker: Ranker, latents: torch.Tensor) -> None:
    video = ranker.look(render_clip(3, 0).frames)
    silence = torch.full_like(latents[:1], float(latents.min()))
    found = ranker.score(video, silence)[0]
    assert (found.valid, found.invalid_reason) == (False, "silent")


def test_contenders_carry_origin_reward_and_what_they_are() -> None:
    latents = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 4, 2)).astype(np.float32))
    latents[2] = latents[0]
    found = as_contenders(["candidate_0", "candidate_1", "candidate_2"], [score(1.0), score(2.0), score(3.0)], latents)
    assert [entry.reward for entry in found] == [1.0, 2.0, 3.0]
    assert found[0].content == found[2].content != found[1].content


def test_an_invalid_or_unfinished_score_is_stored_as_nothing() -> None:
    assert reward_struct(score(0.5)) == {"total": 0.5, "semantic": 0.5, "temporal": 0.5}
    assert reward_struct(score(0.5, valid=False)) is None
    assert reward_struct(score(math.nan)) is None
