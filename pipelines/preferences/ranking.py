"""Scores of latents: decoded to a waveform, then judged by the frozen reward; ranking is a map over clips.

Candidates and ground truth go the same way (stored latents -> codec -> reward), so that no score can come from a
difference between decoded and recorded sound. The latents that were scored are the ones that are trained on: nothing
is decoded and encoded again.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from models.codec import Codec
from models.reward import Reward, RewardScore, VideoFeatures, refused
from pipelines.preferences.pairs import Contender

NONFINITE = "nonfinite"


class Ranker:
    """A frozen reward and a codec on one device."""

    def __init__(self, reward: Reward, codec: Codec, sample_rate_hz: int, device: torch.device) -> None:
        """`sample_rate_hz` is the rate of the sound that the codec decodes to."""
        self._reward = reward
        self._codec = codec
        self._sample_rate_hz = sample_rate_hz
        self._device = device

    @torch.no_grad()
    def look(self, frames: np.ndarray) -> VideoFeatures:
        """Video features of one clip's frames, uint8 [T, H, W, 3] at 16 fps; once a clip."""
        video = torch.from_numpy(frames).to(self._device).permute(0, 3, 1, 2).float() / 255
        return self._reward.video_features(video[None])

    @torch.no_grad()
    def score(self, video: VideoFeatures, latents: Tensor) -> list[RewardScore]:
        """Score stored latents [n, N, C] against the picture, in order.

        A sound with non-finite latents is invalid (`nonfinite`) and never reaches the codec, whose inversion it
        would otherwise spread over the batch.
        """
        finite = torch.isfinite(latents).all(dim=2).all(dim=1)
        scores = [refused(NONFINITE)] * len(latents)
        if finite.any():
            waves = self._codec.decode(latents[finite].to(self._device))
            found = self._reward.score(video, waves, self._sample_rate_hz)
            for index, score in zip(finite.nonzero().flatten().tolist(), found, strict=True):
                scores[index] = score
        return scores


def as_contenders(origins: Sequence[str], scores: Sequence[RewardScore], latents: Tensor) -> list[Contender]:
    """Put origin, score and the digest of each sound's latents [n, N, C] together."""
    return [
        Contender(origin=origin, reward=score.total, valid=score.valid, content=_digest(own))
        for origin, score, own in zip(origins, scores, latents, strict=True)
    ]


def reward_struct(score: RewardScore) -> dict[str, float] | None:
    """The contract's reward struct; None where the sound was invalid or a part is not finite."""
    parts = {"total": score.total, "semantic": score.semantic, "temporal": score.temporal}
    return parts if score.valid and all(math.isfinite(value) for value in parts.values()) else None


def _digest(latents: Tensor) -> str:
    return hashlib.sha256(latents.contiguous().cpu().numpy().tobytes()).hexdigest()
