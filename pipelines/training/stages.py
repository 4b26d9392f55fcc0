"""The trainings as stages: four outcomes, a manifest last, lineage in it; what jobs and rounds call.

A training works in its output folder: `start/` (the model as it is before step 0), `checkpoints/`, `metrics.jsonl`.
Once the manifest names the exported files, the checkpoints and the start are of no more use and are removed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.mmdit import SIZES, SPEC_OF_SIZE
from models.policy import CONFIG_FILE, KIND, POLICY_FILES
from models.preference import PreferenceLossConfig
from models.sf_cavp import SF_CAVP_SIZES
from models.weights import load_config
from pipelines.cluster import connect
from pipelines.data.contracts import FEATURES, PAIRS
from pipelines.data.pictures import require_pictures
from pipelines.data.storage import open_folder
from pipelines.data.store import CHECKPOINT, Dataset, files_manifest, open_local_files
from pipelines.errors import InputError, PipelineError
from pipelines.frozen import FrozenNetworks, open_codec
from pipelines.progress import Progress
from pipelines.stage import Outcome, StageContext, run_stage, stage_run
from pipelines.tracking import Tracker
from pipelines.training.flow_matching_objective import FlowMatchingObjective, fit_starting_policy
from pipelines.training.inputs import check_degraded, check_spec, check_split
from pipelines.training.journal import parse_journal
from pipelines.training.launch import fit
from pipelines.training.loop import CHECKPOINTS, TrainingOrder, TrainingResult
from pipelines.training.mixture import Mixture, open_mixture
from pipelines.training.objective import Objective
from pipelines.training.options import Execution, LoRA, TrainingOptions
from pipelines.training.preference_objective import Kind, PreferenceObjective
from pipelines.training.sf_cavp_objective import SFCAVPObjective, fit_starting_sf_cavp
from pipelines.training.start import START, made_once
from pipelines.training.worker_range import NumWorkers, WorkerRange
from pipelines.training.workers import WorkerGroup
from pipelines.training.workplace import JOURNAL


@dataclass(frozen=True, kw_only=True)
class Launching:
    """Where and how a training runs; nothing of it affects the result beyond rounding."""

    num_workers: NumWorkers
    """Ray Train workers, or a range of them as "2:8"; 0 trains in this process."""
    gpus_per_worker: int | None = None
    """0 or 1; None: one where the cluster has so many now."""
    group: WorkerGroup | None = None
    """A warm group to use instead of new workers."""
    execution: Execution = field(default_factory=Execution)
    """How a policy's network is run; a reward has no use for it."""
    options_yaml: str | None = None
    track: Callable[[StageContext], Tracker] = stage_run
    say: Callable[[str], None] = print

    def check(self, options: TrainingOptions) -> None:
        """Raise InputError where the batch cannot be dealt out to every number of workers that may come."""
        WorkerRange.of(self.num_workers).check_batch(options.batch_size, options.accumulation)


def train_sf_cavp(
    *,
    features: str,
    out: str,
    size: str,
    options: TrainingOptions,
    launching: Launching,
    train_split: str = "train",
    val_split: str = "val",
    codec_share: float = 0.0,
    weights: str | None = None,
    degraded: str | None = None,
    degraded_every: int = 4,
) -> Outcome:
    """Train an SF-CAVP of a named size; leave a calibrated reward and its gates.

    `codec_share` of the sounds go through the codec on their way, as everything does that the reward will rank; for
    clips whose codec has networks they lie at `weights`. One sample in `degraded_every` is a row of the dataset
    `degraded`, whose versions take the place of edits.

    Raises:
        InputError: the features are missing, a split is empty, the codec's networks are not there, or `degraded` does
            not fit the features.
    """
    if size not in SF_CAVP_SIZES:
        raise InputError(f"--size {size}: known sizes are {', '.join(SF_CAVP_SIZES)}")
    launching.check(options)
    dataset = Dataset.open(features, FEATURES)
    for split in (train_split, val_split):
        check_split(dataset, split, features)
    require_pictures(dataset, (train_split, val_split), "SF-CAVP")
    codec = FrozenNetworks()
    if codec_share > 0:
        codec = open_codec(weights, dataset.spec, dataset, policy=None)
    inputs = {"features": dataset.fingerprint, **codec.as_input}
    config = {
        "size": size,
        "split": train_split,
        "val_split": val_split,
        "codec_share": codec_share,
        **options.affecting_bytes(),
    }
    if degraded is not None:
        inputs["degraded"] = check_degraded(degraded, degraded_every, dataset, train_split, size)
        config["degraded_every"] = degraded_every

    def body(context: StageContext) -> None:
        objective = SFCAVPObjective(
            start=made_once(
                context.folder,
                lambda folder: fit_starting_sf_cavp(size, options.seed, features, train_split, folder),
            ),
            features=features,
            size=size,
            sample_rate_hz=dataset.spec.sample_rate_hz,
            spec_name=dataset.spec.name,
            codec_share=codec_share,
            weights=codec.location,
            degraded=degraded,
            degraded_every=degraded_every,
            train_split=train_split,
            val_split=val_split,
        )
        _train(context, objective, options, launching, {"size": size})

    return _stage("train_sf_cavp", config, inputs, out, body, launching)


def train_mmdit(
    *,
    features: str | Sequence[str],
    out: str,
    size: str,
    options: TrainingOptions,
    launching: Launching,
    mix: Sequence[int] | None = None,
    init: str | None = None,
    lora: LoRA | None = None,
    train_split: str = "train",
    val_split: str = "val",
) -> Outcome:
    """Train a policy of a named size by flow matching, from nothing or from the policy at `init`.

    From nothing, the latent transform is fitted on the training split, of several datasets that of the first, before
    step 0; from a policy it is inherited. With `lora` only adapters are trained, and what is left is a plain policy.

    Args:
        features: one dataset, or several to be mixed; rows without video may be among them.
        out: the artifact's folder.
        size: named size.
        options: of the training.
        launching: where and how it runs.
        mix: weight of each dataset; None: its number of rows.
        init: policy to start from; None: fresh weights.
        lora: adapters to train; None: every weight.
        train_split: rows to train on, which every dataset has.
        val_split: rows to validate on, of the datasets that have some.

    Raises:
        InputError: an input is missing or does not fit the size, or the datasets do not fit each other.
    """
    if size not in SIZES:
        raise InputError(f"--size {size}: known sizes are {', '.join(SIZES)}")
    launching.check(options)
    if lora is not None and init is None:
        raise InputError(f"--lora-rank {lora.rank} trains adapters beside a trained policy: give it with --init")
    mixture = open_mixture([features] if isinstance(features, str) else features, mix, size, train_split)
    inputs = mixture.inputs
    if init is not None:
        found, manifest = open_policy(init)
        if size_of(found) != size:
            raise InputError(f"--init {init} is a {size_of(found)} and --size says {size}")
        inputs["init"] = manifest["fingerprint"]
    elif SIZES[size].standardise_conditions:
        mixture.require_video_first()

    def body(context: StageContext) -> None:
        _tell_mixture(context, mixture, launching.say)
        if init is None:
            first = mixture.first.folder.uri
            start = made_once(
                context.folder, lambda folder: fit_starting_policy(size, options.seed, first, train_split, folder)
            )
        else:
            start = open_folder(init).uri
        objective = FlowMatchingObjective(
            start=start,
            features=mixture.members(val_split),
            size=size,
            train_split=train_split,
            val_split=val_split if mixture.has_rows(val_split) else None,
            lora=lora,
            lora_seed=options.seed,
            execution=launching.execution,
        )
        lineage = {"size": size, "spec": SPEC_OF_SIZE[size], **mixture.lineage}
        _train(context, objective, options, launching, lineage)

    config = {"size": size, "split": train_split, "val_split": val_split, **mixture.affecting_bytes}
    config |= {**options.affecting_bytes(), **lora_affecting_bytes(lora)}
    return _stage("train_mmdit", config, inputs, out, body, launching)


def train_rpo(
    *,
    policy: str,
    pairs: str,
    out: str,
    options: TrainingOptions,
    loss: PreferenceLossConfig,
    launching: Launching,
    kind: Kind = "dpo",
    lora: LoRA | None = None,
    sdpo_mu: float | None = None,
    strict_guards: bool = False,
    probe_every: int = 0,
) -> Outcome:
    """Train on from `policy` on the kept pairs: by preferences (`dpo`), or by the control (`winner_fm`).

    With `lora` only adapters are trained, and what is left is a plain policy all the same.

    Raises:
        InputError: an input is missing, or policy and pairs do not fit.
    """
    launching.check(options)
    folder, manifest = open_policy(policy)
    size = size_of(folder)
    dataset = Dataset.open(pairs, PAIRS)
    check_spec(dataset, SPEC_OF_SIZE[size], pairs)
    inputs = {"policy": manifest["fingerprint"], "pairs": dataset.fingerprint}

    def body(context: StageContext) -> None:
        objective = PreferenceObjective(
            start=open_folder(policy).uri,
            pairs=pairs,
            size=size,
            kind=kind,
            loss=loss,
            sdpo_mu=sdpo_mu,
            strict_guards=strict_guards,
            probe_steps=probe_every,
            lora=lora,
            lora_seed=options.seed,
            execution=launching.execution,
        )
        lineage = {"size": size, "spec": SPEC_OF_SIZE[size], "objective": kind}
        _train(context, objective, options, launching, lineage)

    config: dict[str, Any] = {"objective": kind, **options.affecting_bytes(), **lora_affecting_bytes(lora)}
    if kind == "dpo":
        config |= {**vars(loss), "sdpo_mu": sdpo_mu, "strict_guards": strict_guards, "probe_every": probe_every}
    return _stage("train_rpo", config, inputs, out, body, launching)


def _tell_mixture(context: StageContext, mixture: Mixture, say: Callable[[str], None]) -> None:
    """Say and track what a sample costs to read, and which datasets it comes from."""
    size_bytes, lines = mixture.reading_cost()
    for line in lines:
        say(f"{context.name}: {line}")
    context.tracker.metrics(0, {"sample_kb": size_bytes / 1e3})
    for number, member in enumerate(mixture.lineage.get("mixture", ()), start=1):
        context.tracker.tags({f"mixture.{number}": f"{member['weight']} x {member['features']}"})


def lora_affecting_bytes(lora: LoRA | None) -> dict[str, Any]:
    """The adapters as JSON values for a fingerprint; nothing where every weight is trained."""
    return {} if lora is None else {"lora_rank": lora.rank, "lora_alpha": lora.alpha}


def _stage(
    name: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    out: str,
    body: Callable[[StageContext], None],
    launching: Launching,
) -> Outcome:
    return run_stage(
        name=name,
        config=config,
        inputs=inputs,
        out=out,
        body=body,
        options_yaml=launching.options_yaml,
        track=launching.track,
        say=launching.say,
    )


def _train(
    context: StageContext,
    objective: Objective,
    options: TrainingOptions,
    launching: Launching,
    content: Mapping[str, Any],
) -> None:
    """Run the loop, finish the artifact, clear up."""
    tracker = context.tracker
    order = TrainingOrder(objective, options, context.folder.uri)
    needs_ray = WorkerRange.of(launching.num_workers).most > 0 and launching.group is None
    label = f"{context.name} ({objective.name})"
    with connect() if needs_ray else nullcontext(), Progress(label=label, total=options.steps) as progress:
        seen = 0

        def report(step: int, metrics: dict[str, float]) -> None:
            nonlocal seen
            if seen == 0 and step > 1:
                # Of an attempt before this one: steps that took this one no time.
                seen = step - 1
                progress.start_at(seen)
            progress.advance(max(step - seen, 0))
            seen = max(step, seen)
            tracker.metrics(step, _finite(metrics))

        result = fit(
            order,
            num_workers=launching.num_workers,
            gpus_per_worker=launching.gpus_per_worker,
            report=report,
            group=launching.group,
        )
    # Whatever an attempt wrote and could not tell before it died; a step that was told is not doubled.
    for record in parse_journal(context.folder.read_bytes(JOURNAL)):
        tracker.metrics(int(record["step"] or 0), _finite(record))
    for note in result.notes:
        launching.say(f"{context.name}: {note}")
    context.finish({"kind": CHECKPOINT, **content, **_outcome_of(context, result)})
    tracker.tags({"files": ", ".join(result.files), "stopped": str(result.stopped)})
    for name in (CHECKPOINTS, START):
        try:
            context.folder.delete_tree(name)
        except PipelineError as error:
            launching.say(f"{context.name}: {name} is of no more use and could not be deleted: {error}")


def _outcome_of(context: StageContext, result: TrainingResult) -> dict[str, Any]:
    return {
        "files": files_manifest(context.folder, result.files),
        "metrics": _finite(result.metrics),
        "steps": result.steps,
        "skipped_steps": result.skipped_steps,
        "stopped": result.stopped,
        "notes": result.notes,
    }


def _finite(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in metrics.items()
        if name != "step" and value is not None and math.isfinite(value)
    }


def open_policy(location: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a finished policy, its own files verified, and its manifest; raises InputError as `open_files`."""
    return open_local_files(location, CHECKPOINT, only=POLICY_FILES)


def size_of(folder: Path) -> str:
    """The named size of the policy in a folder; raises InputError where it holds none."""
    try:
        size = str(load_config(folder / CONFIG_FILE, KIND)["size"])
    except (ValueError, KeyError) as error:
        raise InputError(f"{folder} holds no policy: {error}") from error
    if size not in SIZES:
        raise InputError(f"{folder} is a policy of unknown size '{size}'; known sizes are {', '.join(SIZES)}")
    return size
