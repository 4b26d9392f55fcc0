"""The stage degrade: a split's clips and a policy -> each clip's sound made worse and worse by that policy.

A clip's real latents are noised part of the way and sampled back, from later and later in the path to nearly nothing
of the sound: the versions carry the generator's own faults, in a known order, and need no label. SF-CAVP that has to
rank a generator's candidates learns from them (`train_sf_cavp --degraded`).
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from models.codec import Codec, build_codec
from models.policy import POLICY_FILES, Policy
from pipelines.clip_stage import fingerprint_of_policy, refuse_many_rejects
from pipelines.data.clip_units import ClipReader, sampled_units
from pipelines.data.commits import dataset_manifest
from pipelines.data.contracts import DEGRADED, FEATURES
from pipelines.data.frames import decode_frames
from pipelines.data.media_write import encode_flac
from pipelines.data.pictures import require_pictures
from pipelines.data.store import CHECKPOINT, Dataset, open_local_files
from pipelines.data.units import Alive, ListedUnits, Pool, Unit, run_units
from pipelines.errors import InputError, MediaError
from pipelines.frozen import FrozenNetworks, open_codec
from pipelines.preferences.candidates import ConditionRow, Sampling, seeded_noise
from pipelines.preferences.pairs import stable_seed
from pipelines.stage import Outcome, StageContext, run_stage, stage_run
from pipelines.tracking import Tracker

STAGE = "degrade"
COLUMNS = ("clip_id", "source", "frames", "clip_features", "sync_features", "text_features", "latent_mean")


@dataclass(frozen=True, kw_only=True)
class DegradeSettings:
    """How sounds are made worse; every field affects the rows."""

    num_versions: int
    starts: tuple[float, float]
    """Earliest and latest time on the path from noise (0) to the real latents (1) at which a version starts."""
    blind: bool
    """Whether the policy is kept from seeing the clip's conditions."""
    sampling: Sampling
    seed: int
    max_clips: int | None

    def __post_init__(self) -> None:
        if min(self.num_versions, self.sampling.num_steps, 1 if self.max_clips is None else self.max_clips) < 1:
            raise InputError("--num-versions, --num-steps and --max-clips must be at least 1")
        if not 0 <= self.starts[0] < self.starts[1] <= 1:
            raise InputError(f"--starts: two times with 0 <= earliest < latest <= 1, got {self.starts}")

    def affecting_bytes(self) -> dict[str, Any]:
        """The fields as JSON values, for the fingerprint."""
        return {**vars(self), "starts": list(self.starts), "sampling": vars(self.sampling)}

    def starts_of(self, clip_id: str) -> list[float]:
        """Where each version starts: one drawn from each equal part of the range, the latest first."""
        rng = random.Random(stable_seed(self.seed, clip_id, STAGE, "starts"))
        earliest, latest = self.starts
        width = (latest - earliest) / self.num_versions
        return [earliest + width * (part + rng.random()) for part in reversed(range(self.num_versions))]

    def noise_seeds(self, clip_id: str) -> list[int]:
        """Seeds in [0, 2^63) of the versions' noise."""
        return [stable_seed(self.seed, clip_id, STAGE, index) for index in range(self.num_versions)]


@dataclass(frozen=True, kw_only=True)
class DegradeInputs:
    """The artifacts it reads."""

    policy: str
    features: str
    split: str
    weights: str | None = None
    """Folder of the codec's networks; None: the policy's own, where it has some."""


class DegradeWorker:
    """The rows of a unit's clips, one clip a call, with a policy and a codec that it holds."""

    def __init__(
        self, features: Dataset, policy: Policy, codec: Codec, settings: DegradeSettings, fingerprint: str
    ) -> None:
        self._reader = ClipReader(features)
        self._rate_hz = features.spec.sample_rate_hz
        self._policy = policy
        self._codec = codec
        self._settings = settings
        self._fingerprint = fingerprint

    def process(self, unit: Unit, alive: Alive) -> tuple[pa.Table, pa.Table]:
        """Rows and rejects of the unit; see `pipelines.data.units.UnitWorker`."""
        return self._reader.rows_and_rejects(unit, COLUMNS, self._row, contract=DEGRADED, stage=STAGE, alive=alive)

    def close(self) -> None:
        """Nothing to end."""

    def _row(self, wanted: dict[str, Any], clip: dict[str, Any]) -> dict[str, Any]:
        # Only looked at: a row whose picture cannot be decoded would end the training that reads it.
        decode_frames(clip["frames"])
        clip_id = clip["clip_id"]
        starts, seeds = self._settings.starts_of(clip_id), self._settings.noise_seeds(clip_id)
        truth = torch.from_numpy(clip["latent_mean"])[None]
        versions = self._versions(clip, truth, starts, seeds)
        if not bool(torch.isfinite(versions).all()):
            raise MediaError("nonfinite", "the policy made latents that are not finite")
        audio, *worse = (encode_flac(wave, self._rate_hz) for wave in self._decoded(torch.cat([truth, versions])))
        return {
            "clip_id": clip_id,
            "frames": clip["frames"],
            "audio": audio,
            "worse": worse,
            "starts": starts,
            "seeds": seeds,
            "latent_mean": clip["latent_mean"],
            "policy": self._fingerprint,
        }

    def _versions(self, clip: dict[str, Any], truth: Tensor, starts: list[float], seeds: list[int]) -> Tensor:
        conditions = ConditionRow(**{name: clip[name] for name in ("clip_features", "sync_features", "text_features")})
        sampling = self._settings.sampling
        return self._policy.regenerate(
            *conditions.tensors(),
            truth,
            seeded_noise(seeds, self._policy.noise_shape(1)[1:]),
            torch.tensor(starts),
            sampling.num_steps,
            sampling.guidance,
            self._settings.blind,
        ).cpu()

    def _decoded(self, latents: Tensor) -> np.ndarray:
        return self._codec.decode(latents.to(self._policy.network.device)).cpu().numpy()


@dataclass(frozen=True, kw_only=True)
class MakeDegradeWorker:
    """Builds a worker where it works; picklable."""

    inputs: DegradeInputs
    settings: DegradeSettings
    fingerprint: str
    """Of the policy."""
    codec: FrozenNetworks

    def __call__(self, device: torch.device) -> DegradeWorker:
        """Load the models onto a device."""
        features = Dataset.open(self.inputs.features, FEATURES)
        folder, _ = open_local_files(self.inputs.policy, CHECKPOINT, only=POLICY_FILES)
        codec = build_codec(features.spec.name, device, self.codec.folder)
        return DegradeWorker(features, Policy.load(folder, device), codec, self.settings, self.fingerprint)


def degrade(
    inputs: DegradeInputs,
    settings: DegradeSettings,
    *,
    out: str,
    pool: Pool,
    max_reject_rate: float = 0.05,
    options_yaml: str | None = None,
    track: Callable[[StageContext], Tracker] = stage_run,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Write the dataset at `out`; killed and called again it goes on where it was.

    Raises:
        InputError: an input is missing or does not fit the others, or the split has no clips.
        Refused: too many clips were rejected; the dataset is there to be looked at.
    """
    features = Dataset.open(inputs.features, FEATURES)
    if features.num_rows(inputs.split) == 0:
        raise InputError(
            f"{inputs.features} has no clips of split '{inputs.split}', only {features.splits}; name one with --split"
        )
    require_pictures(features, (inputs.split,), "SF-CAVP")
    policy = fingerprint_of_policy(inputs.policy, features)
    codec = open_codec(inputs.weights, features.spec, features, inputs.policy)

    def body(context: StageContext) -> None:
        run_units(
            ListedUnits(tuple(_plan(features, inputs.split, settings))),
            pool,
            factory=MakeDegradeWorker(inputs=inputs, settings=settings, fingerprint=policy, codec=codec),
            contract=DEGRADED,
            spec=features.spec,
            out=context.out,
            label=STAGE,
        )
        content = dataset_manifest(context.folder, DEGRADED, features.spec)
        context.tracker.metrics(0, {name: float(count) for name, count in content["counts"].items()})
        context.finish({**content, "num_versions": settings.num_versions})

    outcome = run_stage(
        name=STAGE,
        config={**settings.affecting_bytes(), "split": inputs.split},
        inputs={"features": features.fingerprint, "policy": policy, **codec.as_input},
        out=out,
        body=body,
        version=DEGRADED.version,
        options_yaml=options_yaml,
        track=track,
        say=say,
    )
    refuse_many_rejects(out, max_reject_rate)
    return outcome


def _plan(features: Dataset, split: str, settings: DegradeSettings) -> list[Unit]:
    """Cut the clips, or a seeded sample of them, into units; a function of dataset and settings alone."""
    return sampled_units(
        features, split, settings.max_clips, lambda clip_id: stable_seed(settings.seed, STAGE, clip_id)
    )
