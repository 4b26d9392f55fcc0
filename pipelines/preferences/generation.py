"""The stage generate_preferences: a split's clips, a policy and a reward -> a dataset of pairs.

The counts of what became of every clip are checked against the clips that went in and written into the manifest, and
so is whether the reward has seen these clips in its own training: a reward that memorised them ranks by memory.
"""

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from models.codec import build_codec
from models.policy import POLICY_FILES, Policy
from models.reward import Reward
from models.spec import ClipSpec
from pipelines.clip_stage import fingerprint_of_policy, fingerprint_of_reward, refuse_many_rejects
from pipelines.data.commits import dataset_manifest
from pipelines.data.contracts import FEATURES, PAIRS
from pipelines.data.pictures import require_pictures
from pipelines.data.store import CHECKPOINT, Dataset, open_local_files, read_manifest
from pipelines.data.units import ListedUnits, Pool, Unit, run_units
from pipelines.errors import InputError, Refused
from pipelines.frozen import FrozenNetworks, open_codec
from pipelines.preferences.make_pairs import STAGE, PairMaker, PairSettings, PairWorker, plan_units
from pipelines.preferences.pairs import count_outcomes
from pipelines.preferences.ranking import Ranker
from pipelines.stage import StageContext, run_stage, stage_run
from pipelines.tracking import Tracker

SUMMARISED = ("drop_reason", "margin", "rewards", "reward_ground_truth")
LOW_KEEP_RATE = 0.30
"""Below this share of kept pairs a warning is given: filters and reward do not fit each other."""


@dataclass(frozen=True, kw_only=True)
class PairInputs:
    """The artifacts that pairs are made from."""

    policy: str
    reward: str
    features: str
    split: str
    weights: str | None = None
    """Folder of the codec's networks; None: the policy's own, where it has some."""


@dataclass(frozen=True, kw_only=True)
class MakePairWorker:
    """Builds a worker where it works; picklable."""

    inputs: PairInputs
    settings: PairSettings
    lineage: tuple[str, str]
    """Fingerprints of policy and reward."""
    codec: FrozenNetworks

    def __call__(self, device: torch.device) -> PairWorker:
        """Load the models onto a device."""
        features = Dataset.open(self.inputs.features, FEATURES)
        policy, _ = open_local_files(self.inputs.policy, CHECKPOINT, only=POLICY_FILES)
        reward, _ = open_local_files(self.inputs.reward, CHECKPOINT)
        spec = features.spec
        codec = build_codec(spec.name, device, self.codec.folder)
        ranker = Ranker(Reward.load(reward, device), codec, spec.sample_rate_hz, device)
        maker = PairMaker(Policy.load(policy, device), ranker, spec, self.settings)
        policy_fingerprint, reward_fingerprint = self.lineage
        lineage = {
            "policy": policy_fingerprint,
            "reward_model": reward_fingerprint,
            "round": self.settings.round_index,
        }
        return PairWorker(maker, features, lineage)


def generate_pairs(
    inputs: PairInputs,
    settings: PairSettings,
    *,
    out: str,
    pool: Pool,
    max_reject_rate: float = 0.05,
    options_yaml: str | None = None,
    track: Callable[[StageContext], Tracker] = stage_run,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write the pairs at `out`, or pick up where a killed run stopped, and return the dataset's manifest.

    Raises:
        InputError: an input is missing or does not fit the others, or the split has no clips.
        Refused: no pair was kept, or too many clips were rejected; the dataset is there to be looked at.
    """
    features = Dataset.open(inputs.features, FEATURES)
    fingerprints = check_inputs(inputs, features)
    codec = open_codec(inputs.weights, features.spec, features, inputs.policy)
    reward_saw_clips = seen_in_training(inputs, features)

    def body(context: StageContext) -> None:
        units = plan_units(features, inputs.split, settings)
        factory = MakePairWorker(
            inputs=inputs,
            settings=settings,
            lineage=(fingerprints["policy"], fingerprints["reward"]),
            codec=codec,
        )
        run_units(
            ListedUnits(tuple(units)),
            pool,
            factory=factory,
            contract=PAIRS,
            spec=features.spec,
            out=context.out,
            label=STAGE,
        )
        content = _summarised(context, features.spec, units)
        context.finish({**content, "reward_saw_clips": reward_saw_clips})

    run_stage(
        name=STAGE,
        config={**settings.affecting_bytes(), "split": inputs.split},
        inputs={**fingerprints, **codec.as_input},
        out=out,
        body=body,
        version=PAIRS.version,
        options_yaml=options_yaml,
        track=track,
        say=say,
    )
    manifest = read_manifest(out, kind="dataset")
    _pass_or_refuse(manifest, out, max_reject_rate)
    return manifest


def check_inputs(inputs: PairInputs, features: Dataset) -> dict[str, str]:
    """Fingerprints of the inputs by role; raises InputError where one is missing or does not fit the others."""
    if features.num_rows(inputs.split) == 0:
        raise InputError(
            f"{inputs.features} has no clips of split '{inputs.split}', only {features.splits}; name the one to use "
            f"with --split (with --split train the reward ranks clips it was trained on, which the manifest records)"
        )
    require_pictures(features, (inputs.split,), "the reward")
    return {
        "policy": fingerprint_of_policy(inputs.policy, features),
        "reward": fingerprint_of_reward(inputs.reward),
        "features": features.fingerprint,
    }


def seen_in_training(inputs: PairInputs, features: Dataset) -> bool:
    """Whether the reward was trained on this very split of these features."""
    reward = read_manifest(inputs.reward, kind=CHECKPOINT)
    same_features = reward["inputs"].get("features") == features.fingerprint
    return same_features and reward["config"].get("split", "train") == inputs.split


def reward_summary(table: pa.Table) -> dict[str, float]:
    """Means over the clips of what the reward says of candidates and ground truth; only what is defined.

    `above_min` and `above_max` are the shares of clips whose ground truth scores above the lowest and above the
    highest candidate: where they are low, ground-truth winners carry no signal.
    """
    truths = [entry and entry["total"] for entry in table["reward_ground_truth"].to_pylist()]
    valid = [[entry["total"] for entry in row if entry is not None] for row in table["rewards"].to_pylist()]
    both = [(truth, totals) for truth, totals in zip(truths, valid, strict=True) if truth is not None and totals]
    values = {
        "reward_ground_truth": [truth for truth in truths if truth is not None],
        "reward_mean": [statistics.fmean(totals) for totals in valid if totals],
        "reward_min": [min(totals) for totals in valid if totals],
        "reward_max": [max(totals) for totals in valid if totals],
        "margin": [margin for margin in table["margin"].to_pylist() if margin is not None],
        "ground_truth_above_min": [float(truth > min(totals)) for truth, totals in both],
        "ground_truth_above_max": [float(truth > max(totals)) for truth, totals in both],
    }
    return {name: statistics.fmean(column) for name, column in values.items() if column}


def _summarised(context: StageContext, spec: ClipSpec, units: list[Unit]) -> dict[str, Any]:
    """The dataset's manifest with what became of the clips and what the reward says of them; shown in MLflow too."""
    # Here, because sampling actors import this module and have nothing to draw.
    from pipelines.evaluation.plots import histogram_of

    content = dataset_manifest(context.folder, PAIRS, spec)
    table = Dataset(context.folder, {**content, "fingerprint": context.fingerprint}, PAIRS).read(SUMMARISED)
    outcomes = _outcomes(table, content, units)
    means = reward_summary(table)
    context.tracker.metrics(context.config["round_index"], {**outcomes, **means})
    context.tracker.image("reward_histogram", histogram_of(_rewards(table)))
    return {**content, "outcomes": outcomes, "rewards": means}


def _rewards(table: pa.Table) -> dict[str, np.ndarray]:
    """The valid rewards of real sounds and of candidates, as flat arrays."""
    truths = [entry["total"] for entry in table["reward_ground_truth"].to_pylist() if entry is not None]
    candidates = [entry["total"] for row in table["rewards"].to_pylist() for entry in row if entry is not None]
    return {"real sound": np.array(truths, float), "candidates": np.array(candidates, float)}


def _outcomes(table: pa.Table, content: dict[str, Any], units: list[Unit]) -> dict[str, int]:
    """What became of the clips, checked against the units; read back from the parts, not from receipts."""
    num_clips = sum(len(unit.rows) for unit in units)
    return count_outcomes(num_clips, table["drop_reason"].to_pylist(), content["counts"]["rejected"])


def _pass_or_refuse(manifest: dict[str, Any], out: str, max_reject_rate: float) -> None:
    outcomes = manifest["outcomes"]
    dropped = {name: count for name, count in outcomes.items() if name.startswith("dropped_")}
    reasons = ", ".join(f"{name.removeprefix('dropped_')} {count}" for name, count in dropped.items()) or "none"
    clips, kept = outcomes["clips"], outcomes["kept"]
    refuse_many_rejects(out, max_reject_rate)
    if kept == 0:
        raise Refused(
            f"{out}: none of {clips} pairs was kept (dropped: {reasons}); look at the rewards, the reward does not "
            "separate these sounds: train it on, or lower --margin, with a new --out"
        )
    if kept < math.ceil(LOW_KEEP_RATE * clips):
        sys.stderr.write(f"warning: only {kept} of {clips} pairs were kept (dropped: {reasons})\n")
