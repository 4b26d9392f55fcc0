"""features (+ a reward) -> measures: one flat row a clip with everything that it can be filtered by; a stage.

What was measured while decoding is copied out of the rows; what needs a trained SF-CAVP (does the sound belong to the
picture, and how late is it) is computed here from the stored frames and sound. No clip is rejected: one whose stored
media cannot be read has no correspondence and says why. A page with histograms and examples is part of the artifact.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from models.reward import Reward
from pipelines.curation.report import ReportSettings, write_report
from pipelines.data.clip_units import ClipReader, row_group_units
from pipelines.data.commits import dataset_manifest
from pipelines.data.contracts import FEATURES, MEASURES, REJECTS
from pipelines.data.frames import decode_frames
from pipelines.data.media_write import decode_flac
from pipelines.data.pictures import require_pictures
from pipelines.data.store import CHECKPOINT, Dataset, files_manifest, open_files
from pipelines.data.tables import table_from_rows
from pipelines.data.units import Alive, ListedUnits, Pool, Unit, run_units
from pipelines.errors import InputError, MediaError
from pipelines.scoring import load_reward, score_clip
from pipelines.stage import Outcome, StageContext, run_stage, stage_run
from pipelines.tracking import Tracker

STAGE = "measure"
METHOD = 1
"""Raised when the same inputs would give other numbers; part of the fingerprint."""
CHEAP = ("clip_id", "split", "valid_s", "measures")
UNKNOWN = {"semantic": None, "temporal": None, "reward": None, "offset_s": None}


@dataclass(frozen=True, kw_only=True)
class MakeWorker:
    """Builds a worker where it works; picklable."""

    features: str
    reward: str | None

    def __call__(self, device: torch.device) -> "MeasureWorker":
        """Load the reward, if there is one, onto a device."""
        dataset = Dataset.open(self.features, FEATURES)
        return MeasureWorker(dataset, None if self.reward is None else load_reward(self.reward, device))


class MeasureWorker:
    """Turns units of clip ids, each in one row group, into measures rows."""

    def __init__(self, features: Dataset, reward: Reward | None) -> None:
        """Without a reward, neither frames nor sound are read."""
        self._reader = ClipReader(features)
        self._spec = features.spec
        self._reward = reward

    def process(self, unit: Unit, alive: Alive) -> tuple[pa.Table, pa.Table]:
        """A row for every clip of the unit, and no rejects."""
        columns = CHEAP if self._reward is None else (*CHEAP, "frames", "audio")
        clips = self._reader.read_unit(unit, columns)
        rows = []
        for wanted in unit.rows:
            rows.append(self._row(clips[wanted["clip_id"]]))
            alive()
        return table_from_rows(rows, MEASURES, self._spec), table_from_rows([], REJECTS, self._spec)

    def close(self) -> None:
        """Nothing to end."""

    def _row(self, clip: Mapping[str, Any]) -> dict[str, Any]:
        own = {name: clip[name] for name in ("clip_id", "split", "valid_s")}
        return {**own, **clip["measures"], **self._correspondence(clip)}

    def _correspondence(self, clip: Mapping[str, Any]) -> dict[str, Any]:
        if self._reward is None:
            return {**UNKNOWN, "reward_invalid": None}
        try:
            frames, wave = decode_frames(clip["frames"]), decode_flac(clip["audio"])
        except MediaError as error:
            return {**UNKNOWN, "reward_invalid": str(error)}
        score = score_clip(self._reward, frames, wave, self._spec.sample_rate_hz)
        found = {
            "semantic": score.semantic,
            "temporal": score.temporal,
            "reward": score.total,
            "offset_s": score.offset_s,
        }
        if not score.valid:
            return {**UNKNOWN, "reward_invalid": score.invalid_reason}
        if not all(map(math.isfinite, found.values())):
            return {**UNKNOWN, "reward_invalid": "nonfinite"}
        return {**found, "reward_invalid": None}


def measure(
    features: str,
    reward: str | None,
    *,
    out: str,
    pool: Pool,
    report: ReportSettings,
    options_yaml: str | None = None,
    track: Callable[[StageContext], Tracker] = stage_run,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Write the measures dataset and its page at `out`; killed and called again it goes on where it was.

    Args:
        features: the dataset whose clips are measured.
        reward: a trained SF-CAVP, or None: nothing is then said of correspondence.
        out: the artifact's folder.
        pool: who does it.
        report: what the page shows.
        options_yaml, track, say: as those of `run_stage`.

    Raises:
        InputError: an input is missing or another kind, the features have no rows, or rows without video and a reward
            is given.
    """
    dataset = Dataset.open(features, FEATURES)
    if not dataset.num_rows():
        raise InputError(f"{dataset.folder.uri} has no rows to measure; look at its rejects")
    inputs = {"features": dataset.fingerprint}
    if reward is not None:
        require_pictures(dataset, (None,), "--reward")
        load_reward(reward, "cpu")
        inputs["reward"] = open_files(reward, CHECKPOINT)[1]["fingerprint"]

    def body(context: StageContext) -> None:
        run_units(
            ListedUnits(tuple(row_group_units(dataset))),
            pool,
            factory=MakeWorker(features=features, reward=reward),
            contract=MEASURES,
            spec=dataset.spec,
            out=context.out,
            label="clips measured",
        )
        content = dataset_manifest(context.folder, MEASURES, dataset.spec)
        made = Dataset(context.folder, {**content, "fingerprint": context.fingerprint}, MEASURES)
        names = write_report(context.folder, dataset, made, report, lineage=inputs)
        context.tracker.metrics(0, content["counts"])
        context.finish({**content, "files": files_manifest(context.folder, names)})

    return run_stage(
        name=STAGE,
        config={"method": METHOD, **vars(report)},
        inputs=inputs,
        out=out,
        body=body,
        version=MEASURES.version,
        options_yaml=options_yaml,
        track=track,
        say=say,
    )
