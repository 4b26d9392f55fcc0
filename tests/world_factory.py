"""A small finished world for tests: real rendered clips as features, an untrained policy, an untrained reward.

Everything is what the pipelines would have written (real JPEG frames, latents and conditions of rendered clips), only
the networks have learnt nothing; the reward is calibrated, so that its values spread.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from models.codec import build_codec
from models.encoders import build_encoders
from models.policy import Policy
from models.reward import Reward
from models.sf_cavp import SF_CAVP_SIZES, SFCAVP
from pipelines.data.contracts import FEATURES
from pipelines.data.demo_world import DemoClip, render_clip
from pipelines.data.frames import decode_frames, encode_jpeg
from pipelines.data.measures import measure_clip
from pipelines.data.media_write import encode_flac
from pipelines.data.store import Dataset, files_manifest
from pipelines.data.tables import column_to_numpy, table_from_rows
from pipelines.data.units import HERE
from pipelines.preferences.candidates import Sampling
from pipelines.preferences.degraded import DegradeInputs, DegradeSettings, degrade
from pipelines.stage import StageContext, run_stage
from tests.feature_factory import TINY, write_dataset

WORLD_SEED = 7
CAPTION = "objects that sound"


def world_row(clip: DemoClip, clip_id: str, split: str) -> dict[str, object]:
    """The features row of a rendered clip."""
    encoders, codec = build_encoders("grids", TINY), build_codec(TINY.name)
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
        "events": [vars(event) for event in clip.events],
        "has_video": True,
        "frames": [encode_jpeg(frame) for frame in clip.frames],
        "audio": encode_flac(clip.wave, TINY.sample_rate_hz),
        "measures": measure_clip(clip.wave, TINY.sample_rate_hz, clip.frames, TINY.frames_rate_hz),
        **encoders.encode({encoders.grids[0]: clip.frames}, CAPTION),
        "latent_mean": mean[0].numpy(),
        "latent_std": std[0].numpy(),
    }


def write_world(out: Path, splits: dict[str, int], spoilt: tuple[str, ...] = ()) -> Path:
    """Write features of rendered clips, so many a split, one part each; the frames of `spoilt` clips are no JPEGs."""
    tables, index = {}, 0
    for split, count in splits.items():
        rows = []
        for number in range(count):
            row = world_row(render_clip(WORLD_SEED, index), f"{split}_{number:03d}", split)
            if row["clip_id"] in spoilt:
                row["frames"] = [b"not a picture"] * TINY.frames_len
            rows.append(row)
            index += 1
        tables[split] = table_from_rows(rows, FEATURES, TINY)
    return write_dataset(out, FEATURES, tables, {"splits": splits, "spoilt": list(spoilt)})


def write_policy(out: Path, features: Path, seed: int = 0) -> Path:
    """Write an untrained tiny policy whose transforms are fitted on the features."""
    table = Dataset.open(str(features), FEATURES).read(["latent_mean", "clip_features", "sync_features"])
    columns = [torch.from_numpy(np.array(column_to_numpy(table[name]), np.float32)) for name in table.column_names]
    policy = Policy.create("tiny", seed)
    policy.fit_statistics([(columns[0], columns[1], columns[2])])

    def body(context: StageContext) -> None:
        names = policy.save(context.folder.local_path())
        context.finish({"kind": "checkpoint", "files": files_manifest(context.folder, names)})

    run_stage(name="factory_policy", config={"seed": seed}, inputs={}, out=str(out), body=body, say=lambda line: None)
    return out


def write_degraded(
    out: Path, features: Path, policy: Path, split: str = "train", num_versions: int = 3, max_clips: int | None = None
) -> Path:
    """Write what a policy makes worse of a split's clips, or of some of them, in one Euler step."""
    sampling = Sampling(num_steps=1, guidance=1.0)
    degrade(
        DegradeInputs(policy=str(policy), features=str(features), split=split),
        DegradeSettings(
            starts=(0.0, 0.6), blind=False, num_versions=num_versions, sampling=sampling, seed=0, max_clips=max_clips
        ),
        out=str(out),
        pool=HERE,
        say=lambda line: None,
    )
    return out


def write_reward(out: Path, features: Path, split: str = "val", seed: int = 0, *, train_split: str = "train") -> Path:
    """Write an untrained tiny reward, calibrated on the clips of a split, which says it was trained on another."""
    dataset = Dataset.open(str(features), FEATURES)
    torch.manual_seed(seed)
    codec = build_codec(TINY.name)
    table = dataset.read(["frames", "latent_mean"], split=split)
    pairs = [
        (
            torch.from_numpy(decode_frames(frames)).permute(0, 3, 1, 2)[None] / 255,
            codec.decode(torch.from_numpy(np.array(latents))[None]),
            TINY.sample_rate_hz,
        )
        for frames, latents in zip(table["frames"].to_pylist(), column_to_numpy(table["latent_mean"]), strict=True)
    ]
    reward = Reward.calibrated(SFCAVP(SF_CAVP_SIZES["tiny"]), "tiny", pairs)
    # Which way an untrained reward points is chance; turned so that real sound is above an untrained policy's noise.
    reward.calibration = replace(reward.calibration, semantic_weight=-0.5, temporal_weight=-0.5)

    def body(context: StageContext) -> None:
        names = reward.save(context.folder.local_path())
        context.finish({"kind": "checkpoint", "files": files_manifest(context.folder, names)})

    run_stage(
        name="factory_reward",
        config={"seed": seed, "split": train_split},
        inputs={"features": dataset.fingerprint},
        out=str(out),
        body=body,
        say=lambda line: None,
    )
    return out
