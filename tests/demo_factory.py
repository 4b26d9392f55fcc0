"""Small finished artifacts of the demo world for tests: real clips as features, and untrained models as checkpoints."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from models.codec import build_codec
from models.encoders import build_encoders
from models.policy import Policy
from models.reward import Calibration, Reward
from models.sf_cavp import SF_CAVP_SIZES, SFCAVP
from models.spec import SPECS
from pipelines.data.contracts import FEATURES
from pipelines.data.demo_world import CAPTION, FRAME_RATE_HZ, SAMPLE_RATE_HZ, DemoClip, plan_clips, render_clip
from pipelines.data.frames import encode_jpeg
from pipelines.data.measures import measure_clip
from pipelines.data.media_write import encode_flac, write_mp4
from pipelines.data.store import files_manifest
from pipelines.data.tables import table_from_rows
from pipelines.stage import StageContext, run_stage
from tests.feature_factory import write_dataset

TINY = SPECS["tiny"]


def demo_row(clip_id: str, split: str, clip: DemoClip) -> dict[str, object]:
    """The features row of a rendered clip, as preprocess would make it but for mp4 in between."""
    encoders, codec = build_encoders("grids", TINY), build_codec("tiny")
    conditions = encoders.encode({encoders.grids[0]: clip.frames}, CAPTION)
    mean, std = codec.encode(torch.from_numpy(clip.wave)[None])
    return {
        "clip_id": clip_id,
        "source": f"{clip_id}.mp4",
        "start_s": 0.0,
        "duration_s": TINY.duration_s,
        "valid_s": TINY.duration_s,
        "caption": CAPTION,
        "split": split,
        "content_hash": clip_id,
        "events": [asdict(event) for event in clip.events],
        "has_video": True,
        "frames": [encode_jpeg(frame) for frame in clip.frames],
        "audio": encode_flac(clip.wave, SAMPLE_RATE_HZ),
        "measures": measure_clip(clip.wave, SAMPLE_RATE_HZ, clip.frames, FRAME_RATE_HZ),
        **conditions,
        "latent_mean": mean[0].numpy(),
        "latent_std": std[0].numpy(),
    }


def write_demo_features(out: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """Features of so many demo clips of each split."""
    rows: dict[str, list[dict[str, object]]] = {split: [] for split in counts}
    for plan in plan_clips(counts):
        rows[plan.split].append(demo_row(plan.clip_id, plan.split, render_clip(seed, plan.index)))
    tables = {split: table_from_rows(members, FEATURES, TINY) for split, members in rows.items()}
    return write_dataset(out, FEATURES, tables, {"seed": seed, "counts": counts})


def write_demo_video(path: Path, seconds: float = 2.5, seed: int = 0) -> Path:
    """An mp4 of demo clips one after the other, with their sound."""
    count = -(-round(seconds * FRAME_RATE_HZ) // TINY.frames_len)
    clips = [render_clip(seed, index) for index in range(count)]
    frames = np.concatenate([clip.frames for clip in clips])[: round(seconds * FRAME_RATE_HZ)]
    wave = np.concatenate([clip.wave for clip in clips])[: round(seconds * SAMPLE_RATE_HZ)]
    write_mp4(path, frames, FRAME_RATE_HZ, wave, SAMPLE_RATE_HZ)
    return path


def write_untrained_policy(out: Path, features_seed: int = 0, seed: int = 0) -> Path:
    """A policy of random weights whose sound depends on its conditions; it has learnt nothing."""
    policy = Policy.create("tiny", seed)
    rows = [demo_row(str(i), "train", render_clip(features_seed, i)) for i in range(4)]
    stacked = [
        torch.from_numpy(np.stack([np.asarray(row[name], np.float32) for row in rows]))
        for name in ("latent_mean", "clip_features", "sync_features")
    ]
    policy.fit_statistics([(stacked[0], stacked[1], stacked[2])])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # The output layer starts at zero: a fresh network is deaf to its conditions.
        for weights in policy.network.parameters():
            weights.add_(0.03 * torch.randn(weights.shape, generator=generator))
    return write_checkpoint(out, policy, {"seed": seed})


def write_untrained_reward(out: Path, seed: int = 0) -> Path:
    """A reward of random weights, calibrated to numbers of its own."""
    torch.manual_seed(seed)
    calibration = Calibration(semantic_mean=0.5, semantic_std=0.2, temporal_mean=0.0, temporal_std=0.1, num_pairs=4)
    reward = Reward(SFCAVP(SF_CAVP_SIZES["tiny"]), "tiny", calibration)
    return write_checkpoint(out, reward, {"reward_seed": seed})


def write_checkpoint(out: Path, model: Policy | Reward, config: dict[str, object]) -> Path:
    """A model as a finished checkpoint artifact."""

    def body(context: StageContext) -> None:
        files = model.save(out)
        context.finish({"kind": "checkpoint", "files": files_manifest(context.folder, files)})

    run_stage(name="factory", config=config, inputs={}, out=str(out), body=body, say=lambda line: None)
    return out
