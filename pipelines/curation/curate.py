"""features + measures + predicates -> features of the clips that meet them all, without decoding anything; a stage.

The rows that are kept are the rows that were there, bit for bit, under the same contract, so every job takes them. The
rest are rejects with the reason `filtered` and the predicate that they did not meet, so clips in = kept + rejected.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch

from pipelines.curation.predicates import Predicate, Verdict, filterable, judge, parse_predicates
from pipelines.data.clip_units import row_group_units
from pipelines.data.commits import dataset_manifest
from pipelines.data.contracts import FEATURES, MEASURES, REJECTS
from pipelines.data.store import Dataset, read_manifest
from pipelines.data.tables import reject_row, table_from_rows
from pipelines.data.units import Alive, ListedUnits, Pool, Unit, run_units
from pipelines.errors import InputError, MediaError, Refused
from pipelines.stage import Outcome, StageContext, run_stage, stage_run
from pipelines.tracking import Tracker

STAGE = "curate"
METHOD = 1
"""Raised when the same predicates would keep other clips; part of the fingerprint."""
REASON = "filtered"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What predicates do to a features dataset, before a row is written."""

    features: Dataset
    predicates: tuple[Predicate, ...]
    verdict: Verdict
    inputs: dict[str, str]
    """Fingerprints of features and measures."""
    dropped: dict[str, dict[str, str]]
    """By clip id, for the clips that are not kept: the predicate and the value, as `why`."""


def plan_curation(features: str, measures: str, keep: Sequence[str]) -> Plan:
    """Judge every clip of a features dataset by its measures; reads no row of the features.

    Raises:
        InputError: a predicate is wrong, or the measures are not those of these features.
    """
    clips, measured = Dataset.open(features, FEATURES), Dataset.open(measures, MEASURES)
    predicates = parse_predicates(keep, filterable(MEASURES.schema(measured.spec)))
    made_from = measured.manifest["inputs"].get("features")
    if made_from != clips.fingerprint:
        raise InputError(
            f"{measured.folder.uri} was measured on other features (fingerprint {str(made_from)[:12]}) than "
            f"{clips.folder.uri} ({clips.fingerprint[:12]}); give the measures of these, or run jobs/measure.py"
        )
    # Columns repeat where two predicates share one.
    table = measured.read(list(dict.fromkeys(["clip_id", *(p.column for p in predicates)])))
    verdict = judge(table, predicates)
    dropped = {}
    for index, failed in enumerate(verdict.failed):
        if failed >= 0:
            predicate = predicates[failed]
            value = table[predicate.column][index].as_py()
            found = "it is not known" if value is None else f"it is {value:.6g}"
            dropped[table["clip_id"][index].as_py()] = {"why": f"{predicate.text}: {found}"}
    return Plan(
        features=clips,
        predicates=predicates,
        verdict=verdict,
        inputs={"features": clips.fingerprint, "measures": measured.fingerprint},
        dropped=dropped,
    )


def curate(
    plan: Plan,
    *,
    out: str,
    pool: Pool,
    options_yaml: str | None = None,
    track: Callable[[StageContext], Tracker] = stage_run,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Write the features of the clips that a plan keeps; killed and called again it goes on where it was.

    Args:
        plan: what is kept, see `plan_curation`.
        out: the artifact's folder.
        pool: who copies.
        options_yaml: kept as `config.yaml` beside the artifact.
        track: opens the stage's run.
        say: where the stage's lines go.

    Raises:
        Refused: no clip is kept; the dataset is complete and empty.
    """
    features = plan.features

    def body(context: StageContext) -> None:
        run_units(
            ListedUnits(tuple(row_group_units(features, plan.dropped))),
            pool,
            factory=MakeWorker(features=features.folder.uri),
            contract=FEATURES,
            spec=features.spec,
            out=context.out,
            label="clips copied",
        )
        content = dataset_manifest(context.folder, FEATURES, features.spec)
        if content["counts"]["in"] != features.num_rows():
            raise RuntimeError(f"{features.num_rows()} clips went in, {content['counts']['in']} were kept or dropped")
        context.tracker.metrics(0, content["counts"])
        # The networks that made the rows are still those that made them.
        frozen = features.manifest.get("frozen", {})
        context.finish({**content, "frozen": frozen, "predicates": [vars(e) for e in plan.verdict.effects]})

    outcome = run_stage(
        name=STAGE,
        config={"keep": [predicate.text for predicate in plan.predicates], "method": METHOD},
        inputs=plan.inputs,
        out=out,
        body=body,
        version=FEATURES.version,
        options_yaml=options_yaml,
        track=track,
        say=say,
    )
    counts = read_manifest(out, kind="dataset")["counts"]
    if not counts["out"]:
        raise Refused(f"{out}: none of {counts['in']} clips meets every --keep; see its rejects and loosen one")
    return outcome


@dataclass(frozen=True, kw_only=True)
class MakeWorker:
    """Builds a worker where it works; picklable."""

    features: str

    def __call__(self, device: torch.device) -> "CurationWorker":
        """Open the features; `device` is not used."""
        return CurationWorker(Dataset.open(self.features, FEATURES))


class CurationWorker:
    """Copies the kept rows of row groups."""

    def __init__(self, features: Dataset) -> None:
        """`features` is the dataset that the units were cut from."""
        self._features = features
        self._parts = {part.path: part for part in features.parts}

    def process(self, unit: Unit, alive: Alive) -> tuple[pa.Table, pa.Table]:
        """The rows that are kept, and a reject for every other."""
        part, index = self._parts[unit.rows[0]["part"]], unit.rows[0]["row_group"]
        kept = [number for number, row in enumerate(unit.rows) if "why" not in row]
        # Nothing heavy is read of a row group that nothing is kept of, nor sources where nothing is dropped.
        table = (
            self._features.read_row_group(part, index) if kept else table_from_rows([], FEATURES, self._features.spec)
        )
        rejects = []
        if len(kept) < len(unit.rows):
            sources = self._features.read_row_group(part, index, ["source"])["source"].to_pylist()
            rejects = [
                reject_row({**row, "source": source}, STAGE, MediaError(REASON, row["why"]))
                for row, source in zip(unit.rows, sources, strict=True)
                if "why" in row
            ]
        alive()
        return table.take(pa.array(kept, pa.int64())), table_from_rows(rejects, REJECTS, self._features.spec)

    def close(self) -> None:
        """Nothing to end."""
