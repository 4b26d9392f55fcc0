"""Scores of one subject on one split: sample with fixed noise, decode, and measure each clip; a stage.

The noise is a function of (seed, clip, candidate) alone, so every model is asked the same question and comparisons are
paired. The reward is measured here beside measures that share nothing with it: the detector against the known events,
the log-mel distance, and simple audio statistics.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from models.codec import build_codec
from models.policy import POLICY_FILES, Policy
from models.reward import Reward
from models.spec import ClipSpec
from pipelines.clip_stage import fingerprint_of_policy, fingerprint_of_reward, refuse_many_rejects
from pipelines.data.commits import dataset_manifest
from pipelines.data.contracts import FEATURES, SCORES
from pipelines.data.pictures import require_pictures
from pipelines.data.store import CHECKPOINT, Dataset, open_local_files
from pipelines.data.units import ListedUnits, Pool, run_units
from pipelines.errors import InputError
from pipelines.evaluation.measuring import ClipMeasurer, EvaluationWorker
from pipelines.evaluation.scores import ClipScores
from pipelines.evaluation.subjects import EvaluationSettings, plan_units
from pipelines.evaluation.summary import point_values
from pipelines.frozen import FrozenNetworks, open_codec
from pipelines.stage import Outcome, StageContext, run_stage, stage_run
from pipelines.tracking import Tracker

STAGE = "evaluate"


@dataclass(frozen=True, kw_only=True)
class EvaluationInputs:
    """The artifacts an evaluation reads."""

    features: str
    reward: str
    policy: str | None
    """None where nothing is sampled."""
    weights: str | None = None
    """Folder of the codec's networks; None: the policy's own, where it has some."""


@dataclass(frozen=True, kw_only=True)
class MakeWorker:
    """Builds a worker where it works; picklable."""

    inputs: EvaluationInputs
    settings: EvaluationSettings
    codec: FrozenNetworks

    def __call__(self, device: torch.device) -> EvaluationWorker:
        """Load the models onto a device; raises InputError where a checkpoint does not fit this code."""
        features = Dataset.open(self.inputs.features, FEATURES)
        try:
            measurer = self._measurer(features.spec, device)
        except ValueError as error:
            raise InputError(str(error)) from error
        return EvaluationWorker(features, measurer)

    def _measurer(self, spec: ClipSpec, device: torch.device) -> ClipMeasurer:
        reward, _ = open_local_files(self.inputs.reward, CHECKPOINT)
        policy = None
        if self.settings.needs_policy and self.inputs.policy is not None:
            folder, _ = open_local_files(self.inputs.policy, CHECKPOINT, only=POLICY_FILES)
            policy = Policy.load(folder, device)
        return ClipMeasurer(
            policy=policy,
            reward=Reward.load(reward, device),
            codec=build_codec(spec.name, device, self.codec.folder),
            spec=spec,
            settings=self.settings,
            device=device,
        )


def evaluate(
    inputs: EvaluationInputs,
    settings: EvaluationSettings,
    *,
    out: str,
    pool: Pool,
    max_reject_rate: float = 0.05,
    options_yaml: str | None = None,
    track: Callable[[StageContext], Tracker] = stage_run,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Write the scores dataset at `out`; killed and called again it goes on where it was.

    Raises:
        InputError: an input is missing or does not fit the others, or the split has no clips.
        Refused: too many clips were rejected; the dataset is there to be looked at.
    """
    features = Dataset.open(inputs.features, FEATURES)
    require_pictures(features, (settings.split,), "the reward")
    fingerprints = _check_inputs(inputs, settings, features)
    codec = open_codec(inputs.weights, features.spec, features, inputs.policy)
    units = plan_units(features, settings)

    def body(context: StageContext) -> None:
        # Here, because sampling actors import this module and have nothing to draw.
        from pipelines.evaluation.show_scores import show_scores

        run_units(
            ListedUnits(tuple(units)),
            pool,
            factory=MakeWorker(inputs=inputs, settings=settings, codec=codec),
            contract=SCORES,
            spec=features.spec,
            out=context.out,
            label=f"{STAGE} {settings.subject}",
        )
        content = dataset_manifest(context.folder, SCORES, features.spec)
        made = Dataset(context.folder, {**content, "fingerprint": context.fingerprint}, SCORES)
        if made.num_rows():
            show_scores(context.tracker, features, made, _clip_scores(made), settings.subject)
        context.finish(content)

    outcome = run_stage(
        name=STAGE,
        config=settings.affecting_bytes(),
        inputs={**fingerprints, **codec.as_input},
        out=out,
        body=body,
        version=SCORES.version,
        options_yaml=options_yaml,
        track=track,
        say=say,
    )
    refuse_many_rejects(out, max_reject_rate)
    return outcome


def _check_inputs(inputs: EvaluationInputs, settings: EvaluationSettings, features: Dataset) -> dict[str, str]:
    """Fingerprints of the inputs by role; raises InputError where one is missing or does not fit the features."""
    fingerprints = {"features": features.fingerprint, "reward": fingerprint_of_reward(inputs.reward)}
    if settings.needs_policy:
        if inputs.policy is None:
            raise InputError("--policy is missing: this subject samples from one")
        fingerprints["policy"] = fingerprint_of_policy(inputs.policy, features)
    return fingerprints


def read_scores(location: str) -> tuple[ClipScores, dict[str, Any]]:
    """A finished evaluation as arrays, and its manifest.

    Raises:
        InputError: not there, not finished, or without a single clip.
    """
    dataset = Dataset.open(location, SCORES)
    if dataset.num_rows() == 0:
        raise InputError(f"{dataset.folder.uri} has no scored clips; look at its rejects")
    return _clip_scores(dataset), dict(dataset.manifest)


def _clip_scores(dataset: Dataset) -> ClipScores:
    columns = [column.name for column in SCORES.columns if column.name != "audio"]
    return ClipScores.from_table(dataset.read(columns))


def measures(location: str, codec: str | None = None) -> dict[str, float]:
    """The value of each metric of a finished evaluation, by name; a metric that it does not have is absent.

    `codec`: an evaluation of the same real sounds after the codec, for the distance to those. Raises InputError as
    `read_scores` does, or where the two are not of the same clips.
    """
    scores = read_scores(location)[0]
    return point_values(scores if codec is None else scores.beside_codec(read_scores(codec)[0]))
