"""Videos -> features: a manifest becomes a plan of windows, and each window becomes one row or one reject."""

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from models.encoders import check_encoders
from models.pretrained import codec_roles, encoder_roles
from pipelines.data.clip_worker import ClipWorker
from pipelines.data.commits import dataset_manifest, sweep
from pipelines.data.contracts import FEATURES
from pipelines.data.decoding import DecodeLimits, Decoder
from pipelines.data.manifest import Entries, plan_windows
from pipelines.data.planned_units import write_plan
from pipelines.data.preprocess_settings import STAGE, PreprocessSettings
from pipelines.data.source import SourceReader
from pipelines.data.store import Dataset
from pipelines.data.units import Pool, run_units
from pipelines.errors import InputError, MediaError, Refused
from pipelines.frozen import FrozenNetworks, open_frozen
from pipelines.stage import StageContext, run_stage


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
    units = write_plan(context.out, plan, plan_rows)
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
    content["frozen"] = dict(frozen.sha256)
    made = Dataset(context.folder, {**content, "fingerprint": context.fingerprint}, FEATURES)
    shown = {f"reject/{reason}": count for reason, count in reject_counts(made).items()}
    context.tracker.metrics(0, {**content["counts"], **{f"clips/{k}": n for k, n in made.splits.items()}, **shown})
    context.finish(content)


def _plan(out: str, entries: Entries, settings: PreprocessSettings, pool: Pool) -> "pa.Table":
    lengths = measure_lengths(entries, settings, max(pool.num_workers, 1)) if settings.windows == "all" else {}
    rows = plan_windows(
        entries.entries,
        clip_s=settings.clip_spec.duration_s,
        windows=settings.windows,
        hop_s=settings.hop_s,
        length_of=lambda entry: lengths.get(entry.uri),
    )
    import pyarrow as pa

    made = []
    for row in rows:
        d = row.as_dict()
        problem = d.pop("problem")
        d["reason"], d["detail"] = problem if problem else (None, None)
        d["events"] = None if d["events"] is None else json.dumps(d["events"])
        d["uri"] = d["uri"].encode("utf-8", "surrogateescape")
        made.append(d)
    made.sort(key=lambda d: (d["split"], d["clip_id"]))
    types = {
        "clip_id": pa.string(),
        "split": pa.string(),
        "uri": pa.binary(),
        "source": pa.string(),
        "start_s": pa.float64(),
        "caption": pa.string(),
        "events": pa.string(),
        "reason": pa.string(),
        "detail": pa.string(),
    }
    return pa.Table.from_pylist(made, schema=pa.schema(list(types.items())))


def plan_rows(table):
    for d in table.to_pylist():
        d["uri"] = d["uri"].decode("utf-8", "surrogateescape")
        d["events"] = None if d["events"] is None else json.loads(d["events"])
        reason, detail = d.pop("reason"), d.pop("detail")
        d["problem"] = None if reason is None else (reason, detail)
        yield d


def measure_lengths(entries: Entries, settings: PreprocessSettings, num_threads: int) -> dict[str, float]:
    """Seconds that each file holds, from its header; files that do not say, or cannot be opened, are left out."""
    uris = sorted({entry.uri for entry in entries.entries if entry.problem is None})
    shares = [uris[i::num_threads] for i in range(num_threads)]
    with ThreadPoolExecutor(num_threads) as pool:
        found = pool.map(partial(_measure, settings=settings), shares)
    return {uri: length for share in found for uri, length in share.items()}


def _measure(uris: Sequence[str], settings: PreprocessSettings) -> dict[str, float]:
    lengths: dict[str, float] = {}
    sources = SourceReader()
    with Decoder(DecodeLimits(timeout_s=settings.timeout_s)) as decoder:
        for uri in uris:
            try:
                with sources.open(uri) as media:
                    length = decoder.probe(media.path, settings.max_pixels).duration_s
            except MediaError:
                # The worker that meets this file says why, in a reject.
                continue
            if length is not None:
                lengths[uri] = length
    return lengths


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
