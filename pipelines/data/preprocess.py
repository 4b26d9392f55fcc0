"""Videos -> features: a manifest becomes a plan of windows, and each window becomes one row or one reject."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa

from models.encoders import check_encoders
from models.pretrained import codec_roles, encoder_roles
from pipelines.data.clip_worker import ClipWorker
from pipelines.data.commits import dataset_manifest, sweep
from pipelines.data.contracts import FEATURES
from pipelines.data.entries import Entries
from pipelines.data.plan import files_to_survey, plan_rows, plan_windows
from pipelines.data.planned_units import write_plan
from pipelines.data.preprocess_settings import STAGE, PreprocessSettings
from pipelines.data.store import Dataset
from pipelines.data.survey import SurveySettings, survey_files
from pipelines.data.units import Pool, run_units
from pipelines.errors import InputError, Refused
from pipelines.frozen import FrozenNetworks, open_frozen
from pipelines.stage import StageContext, run_stage

SURVEY_FOLDER = "survey"


def preprocess(
    entries: Entries,
    settings: PreprocessSettings,
    *,
    out: str,
    pool: Pool,
    max_reject_rate: float = 0.05,
    options_yaml: str | None = None,
) -> Dataset:
    """Make the features dataset of a manifest or a folder, as a stage.

    Args:
        entries: what to process.
        settings: how.
        out: the artifact's folder.
        pool: who does it.
        max_reject_rate: rejected / all, `missing` not counted, above which the finished dataset is refused.
        options_yaml: kept as `config.yaml` beside the artifact.

    Raises:
        InputError: unknown encoders, missing networks, two entries of one key, a folder of another configuration.
        Refused: the dataset is complete, and more was rejected than allowed, or nothing is left.
    """
    frozen = find_networks(settings)
    run_stage(
        name=STAGE,
        config=settings.fingerprinted(),
        inputs={"manifest": entries.fingerprint, **frozen.as_input},
        out=out,
        body=partial(_run, entries=entries, settings=settings, frozen=frozen, pool=pool),
        version=FEATURES.version,
        options_yaml=options_yaml,
    )
    dataset = Dataset.open(out, FEATURES)
    refuse_rejects(dataset, max_reject_rate)
    return dataset


def find_networks(settings: PreprocessSettings) -> FrozenNetworks:
    """The frozen networks that the settings need; fails before any work starts, not in the first worker.

    Raises:
        InputError: unknown encoders, or of another spec, or a network is not there.
    """
    spec = settings.clip_spec
    try:
        check_encoders(settings.encoders, spec)
    except ValueError as error:
        raise InputError(f"--spec {settings.spec} --encoders {settings.encoders}: {error}") from error
    return open_frozen(settings.weights, (*codec_roles(spec, decoding=False), *encoder_roles(spec)))


def _run(
    context: StageContext, *, entries: Entries, settings: PreprocessSettings, frozen: FrozenNetworks, pool: Pool
) -> None:
    plan = _plan(context.out, entries, settings, pool)
    units = write_plan(context.out, plan, planned_rows)
    run_units(
        units,
        pool,
        factory=partial(ClipWorker, settings, frozen),
        contract=FEATURES,
        spec=settings.clip_spec,
        out=context.out,
        label="clips",
    )
    content = dataset_manifest(context.folder, FEATURES, settings.clip_spec)
    if content["counts"]["in"] != plan.num_rows:
        raise RuntimeError(f"{plan.num_rows} windows went in, {content['counts']['in']} came out or were rejected")
    sweep(context.folder, content)
    content["counts"]["repeated"] = entries.num_repeated
    content["excluded"] = dict(entries.num_excluded)
    content["frozen"] = dict(frozen.sha256)
    made = Dataset(context.folder, {**content, "fingerprint": context.fingerprint}, FEATURES)
    shown = {f"reject/{reason}": count for reason, count in reject_counts(made).items()}
    context.tracker.metrics(0, {**content["counts"], **{f"clips/{k}": n for k, n in made.splits.items()}, **shown})
    context.finish(content)


def _plan(out: str, entries: Entries, settings: PreprocessSettings, pool: Pool) -> pa.Table:
    """The windows of all entries; what has to be known of whole files is found out once and kept in `survey/`."""
    surveyed = {}
    if settings.windows != "first":
        surveyed = survey_files(
            files_to_survey(entries),
            SurveySettings(
                scenes=settings.windows == "scenes",
                max_pixels=settings.max_pixels,
                timeout_s=settings.timeout_s,
                audio_only=settings.audio_only,
            ),
            settings.clip_spec,
            out=f"{out}/{SURVEY_FOLDER}",
            pool=pool,
        )
    return plan_windows(
        entries,
        clip_s=settings.clip_spec.duration_s,
        windows=settings.windows,
        hop_s=settings.hop_s,
        surveyed=surveyed,
        max_file_s=settings.max_file_s,
    )


def planned_rows(plan: pa.Table) -> Iterator[dict[str, Any]]:
    """What a worker is told of each row of (a slice of) a plan."""
    return plan_rows(plan, 0, plan.num_rows)


def refuse_rejects(dataset: Dataset, max_reject_rate: float) -> None:
    """The gate on rejects; `missing` files are counted but not held against the corpus.

    Raises:
        Refused: too many were rejected, or no row is left.
    """
    reasons = reject_counts(dataset)
    total, kept = dataset.manifest["counts"]["in"], dataset.manifest["counts"]["out"]
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    rejected = sum(count for reason, count in reasons.items() if reason != "missing")
    if kept == 0:
        raise Refused(f"{dataset.folder.uri}: none of {total} clips could be used ({listed}); see rejects/")
    if rejected > max_reject_rate * total:
        raise Refused(
            f"{dataset.folder.uri} is complete, but {rejected} of {total} clips were rejected ({listed}), more than "
            f"--max-reject-rate {max_reject_rate:g}; see rejects/, or allow it with a higher rate"
        )


def reject_counts(dataset: Dataset) -> dict[str, int]:
    """How many clips were rejected, by reason in alphabetical order."""
    return dict(sorted(Counter(dataset.read_rejects()["reason"].to_pylist()).items()))
