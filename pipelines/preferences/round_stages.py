"""The stages of a preference round as the pipelines have them, and the launch that folds them: rpo_rounds."""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from models.preference import PreferenceLossConfig
from pipelines.cluster import connect
from pipelines.data.contracts import FEATURES, SCORES
from pipelines.data.pictures import require_pictures
from pipelines.data.store import Dataset, files_manifest, open_files, read_manifest
from pipelines.data.units import Pool
from pipelines.errors import InputError, Refused
from pipelines.evaluation.evaluate import EvaluationInputs, evaluate, measures
from pipelines.evaluation.subjects import EvaluationSettings
from pipelines.frozen import open_codec
from pipelines.preferences.gate import Check, GateLimits, GateMode, Verdict, judge
from pipelines.preferences.generation import PairInputs, check_inputs, generate_pairs
from pipelines.preferences.make_pairs import PairSettings
from pipelines.preferences.pairs import stable_seed
from pipelines.preferences.rounds import Objective, RoundCost, launch_manifest, plan_lines, refused_line, run_rounds
from pipelines.stage import StageContext, lineage_tags, plan_stage, run_stage, stage_run, untracked
from pipelines.tracking import Tracker, open_launch
from pipelines.training.options import Execution, LoRA, TrainingOptions
from pipelines.training.stages import Launching, lora_affecting_bytes, train_rpo
from pipelines.training.worker_range import NumWorkers, WorkerRange
from pipelines.training.workers import WorkerGroup, warm_workers

STAGE = "rpo_rounds"
GATE_STAGE = "round_gate"
VERDICT_FILE = "verdict.json"
VERDICT = "verdict"


@dataclass(frozen=True, kw_only=True)
class PreferenceTraining:
    """How the policy of a round is trained on its pairs."""

    options: TrainingOptions
    loss: PreferenceLossConfig
    sdpo_mu: float | None
    strict_guards: bool
    probe_every: int
    lora: LoRA | None = None
    """Adapters to train in each round, merged before the next; None: every weight."""

    def of_round(self, round_index: int) -> TrainingOptions:
        """The options of one round: other draws each round, the same for policy and control."""
        return replace(self.options, seed=stable_seed(self.options.seed, "training", round_index))

    def affecting_bytes(self) -> dict[str, Any]:
        """The fields as JSON values, for the fingerprint."""
        guards = {"sdpo_mu": self.sdpo_mu, "strict_guards": self.strict_guards, "probe_every": self.probe_every}
        return {
            **self.options.affecting_bytes(),
            **lora_affecting_bytes(self.lora),
            "loss": asdict(self.loss),
            **guards,
        }


@dataclass(frozen=True, kw_only=True)
class RoundSettings:
    """Everything that decides what comes out of a launch."""

    num_rounds: int
    pairs: PairSettings
    """Those of the first round."""
    later_margins: tuple[float, ...] = ()
    """The margin of each round after the first; empty: that of the first throughout."""
    training: PreferenceTraining
    evaluation: EvaluationSettings
    limits: GateLimits
    gate: GateMode
    with_control: bool

    def __post_init__(self) -> None:
        if self.num_rounds < 1:
            raise InputError(f"--rounds must be at least 1, got {self.num_rounds}")
        if self.later_margins and len(self.later_margins) != self.num_rounds - 1:
            given = 1 + len(self.later_margins)
            raise InputError(f"--margin has {given} numbers for --rounds {self.num_rounds}; give one, or one a round")
        for index in range(self.num_rounds):
            self.pairs_of(index)
        if self.evaluation.num_candidates < 2:
            raise InputError("--eval-candidates must be at least 2: the gate looks at the diversity among them")

    def pairs_of(self, round_index: int) -> PairSettings:
        """The settings of a round's pairs; raises InputError where they cannot be."""
        margins = (self.pairs.margin, *self.later_margins)
        return replace(self.pairs, round_index=round_index, margin=margins[min(round_index, len(margins) - 1)])

    def affecting_bytes(self) -> dict[str, Any]:
        """The fields as JSON values, for the fingerprint."""
        later = {"later_margins": list(self.later_margins)} if self.later_margins else {}
        return {
            **later,
            "num_rounds": self.num_rounds,
            "pairs": self.pairs.affecting_bytes(),
            "training": self.training.affecting_bytes(),
            "evaluation": self.evaluation.affecting_bytes(),
            "limits": asdict(self.limits),
            "gate": self.gate,
            "with_control": self.with_control,
        }


def launch_tracker(context: StageContext) -> Tracker:
    """The MLflow run of the launch; the stages inside become its children."""
    return open_launch(context.out, context.name, params=context.config, tags=lineage_tags(context))


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Where the work is done; nothing of it affects the result beyond rounding."""

    num_workers: NumWorkers
    """Ray Train workers that train and sample, or a range of them as "2:8"; 0 works in this process, without Ray."""
    gpus_per_worker: int | None = None
    """0 or 1; None: one where the cluster has so many now."""
    execution: Execution = field(default_factory=Execution)
    """How the policy's network is run while it trains."""
    max_reject_rate: float = 0.05
    track_launch: Callable[[StageContext], Tracker] = launch_tracker
    track_stage: Callable[[StageContext], Tracker] = stage_run


class PipelineStages:
    """`RoundStages` made of the pipelines' own stages."""

    def __init__(
        self,
        inputs: PairInputs,
        settings: RoundSettings,
        resources: Resources,
        group: WorkerGroup | None,
        say: Callable[[str], None],
    ) -> None:
        """`group`: warm workers; None where all is done in this process."""
        # The policies of later rounds have no codec beside them: M_0's is used, which `check_launch` has found.
        self._inputs = replace(inputs, weights=inputs.weights or inputs.policy)
        self._settings = settings
        self._resources = resources
        self._group = group
        self._pool = Pool(num_workers=WorkerRange.of(resources.num_workers).most, group=group)
        self._say = say

    def make_pairs(self, policy: str, round_index: int, out: str) -> None:
        """See `RoundStages`."""
        generate_pairs(
            replace(self._inputs, policy=policy),
            self._settings.pairs_of(round_index),
            out=out,
            pool=self._pool,
            max_reject_rate=self._resources.max_reject_rate,
            track=self._resources.track_stage,
            say=self._say,
        )

    def train(self, policy: str, pairs: str, round_index: int, out: str, objective: Objective) -> None:
        """See `RoundStages`."""
        training = self._settings.training
        train_rpo(
            policy=policy,
            pairs=pairs,
            out=out,
            options=training.of_round(round_index),
            loss=training.loss,
            launching=Launching(
                num_workers=self._resources.num_workers,
                group=self._group,
                execution=self._resources.execution,
                track=self._resources.track_stage,
                say=self._say,
            ),
            kind=objective,
            lora=training.lora,
            sdpo_mu=training.sdpo_mu,
            strict_guards=training.strict_guards,
            probe_every=training.probe_every,
        )

    def evaluate(self, policy: str, out: str) -> None:
        """See `RoundStages`."""
        self._evaluate(policy, self._settings.evaluation, out)

    def evaluate_codec(self, out: str) -> None:
        """See `RoundStages`."""
        self._evaluate(None, replace(self._settings.evaluation, subject="inverted", num_candidates=1), out)

    def _evaluate(self, policy: str | None, settings: EvaluationSettings, out: str) -> None:
        evaluate(
            EvaluationInputs(
                features=self._inputs.features,
                reward=self._inputs.reward,
                policy=policy,
                weights=self._inputs.weights,
            ),
            settings,
            out=out,
            pool=self._pool,
            max_reject_rate=self._resources.max_reject_rate,
            track=self._resources.track_stage,
            say=self._say,
        )

    def judge(self, before: str, after: str, codec: str, out: str) -> Verdict:
        """See `RoundStages`."""
        return judge_stage(before, after, codec, self._settings.limits, out=out, say=self._say)


def judge_stage(
    before: str, after: str, codec: str, limits: GateLimits, *, out: str, say: Callable[[str], None]
) -> Verdict:
    """Compare two finished evaluations, each beside that of the codec, and leave `verdict.json` at `out`."""
    places = {"before": before, "after": after, "codec": codec}
    inputs = {name: Dataset.open(place, SCORES).fingerprint for name, place in places.items()}

    def body(context: StageContext) -> None:
        content = judge(measures(before, codec), measures(after, codec), limits).to_json()
        context.folder.write_bytes(VERDICT_FILE, (json.dumps(content, indent=1) + "\n").encode())
        context.finish(
            {"kind": VERDICT, "verdict": content["verdict"], "files": files_manifest(context.folder, [VERDICT_FILE])}
        )

    # Its numbers are shown in the launch's own run.
    run_stage(name=GATE_STAGE, config=asdict(limits), inputs=inputs, out=out, body=body, track=untracked, say=say)
    verdict = read_verdict(out)
    reasons = f" ({'; '.join(verdict.reasons)})" if verdict.reasons else ""
    say(f"{GATE_STAGE}: {'accepted' if verdict.accepted else 'refused'}{reasons}")
    return verdict


def read_verdict(location: str) -> Verdict:
    """The verdict of a finished gate stage; raises InputError where there is none, or where it was altered."""
    folder, _ = open_files(location, VERDICT)
    content = json.loads(folder.read_bytes(VERDICT_FILE))
    return Verdict(checks=tuple(Check(**entry) for entry in content["checks"]))


def launch_rounds(
    inputs: PairInputs,
    settings: RoundSettings,
    resources: Resources,
    *,
    out: str,
    group: WorkerGroup | None = None,
    options_yaml: str | None = None,
    say: Callable[[str], None] = print,
) -> Mapping[str, Any]:
    """Run the rounds and return the launch's manifest; killed and called again it goes on where it was.

    Raises:
        InputError: an input is missing or does not fit the others, before any work starts.
        Refused: a strict gate refused a round, or a round kept no pair; what there is lies at `out`.
    """
    options = settings.training.options
    WorkerRange.of(resources.num_workers).check_batch(options.batch_size, options.accumulation)
    fingerprints = check_launch(inputs, settings)

    def body(context: StageContext) -> None:
        with ExitStack() as stack:
            workers = _workers(stack, resources, group)
            launch = run_rounds(
                policy=inputs.policy,
                out=context.out,
                num_rounds=settings.num_rounds,
                gate=settings.gate,
                with_control=settings.with_control,
                stages=PipelineStages(inputs, settings, resources, workers, say),
            )
            content = launch_manifest(launch, context.out, settings.with_control)
        for entry in content["rounds"]:
            context.tracker.metrics(entry["round"], _gate_metrics(entry["checks"]))
        stopped_at, final_policy = str(content["stopped_at"]), content["final_policy"]["path"]
        context.tracker.tags({"final_policy": final_policy, "stopped_at": stopped_at})
        context.finish(content)

    run_stage(
        name=STAGE,
        config=_config(inputs, settings),
        inputs=fingerprints,
        out=out,
        body=body,
        options_yaml=options_yaml,
        track=resources.track_launch,
        say=say,
    )
    manifest = read_manifest(out, kind="rounds")
    if manifest["stopped_at"] is not None:
        raise Refused(refused_line(manifest["rounds"], manifest["stopped_at"], manifest["final_policy"]["path"]))
    return manifest


def check_launch(inputs: PairInputs, settings: RoundSettings) -> dict[str, str]:
    """Fingerprints of the inputs; raises InputError where one is missing, does not fit, or lacks a split."""
    features = Dataset.open(inputs.features, FEATURES)
    codec = open_codec(inputs.weights, features.spec, features, inputs.policy)
    fingerprints = {**check_inputs(inputs, features), **codec.as_input}
    held_out = settings.evaluation.split
    if features.num_rows(held_out) == 0:
        raise InputError(
            f"{inputs.features} has no clips of split '{held_out}' for the gate, only {features.splits}; "
            "name one with --eval-split"
        )
    require_pictures(features, (held_out,), "the gate")
    if held_out == inputs.split:
        raise InputError(f"--eval-split and --split are both '{held_out}': the gate must see clips held out from pairs")
    return fingerprints


def _workers(stack: ExitStack, resources: Resources, group: WorkerGroup | None) -> WorkerGroup | None:
    """The group that was handed in, or one of our own for all rounds, or None to work in this process."""
    if group is not None or WorkerRange.of(resources.num_workers).most == 0:
        return group
    stack.enter_context(connect())
    return stack.enter_context(warm_workers(resources.num_workers, gpus_per_worker=resources.gpus_per_worker))


def _gate_metrics(checks: list[dict[str, Any]]) -> dict[str, float]:
    return {f"gate/{check['measure']}": check["after"] for check in checks if check["after"] is not None}


def plan_launch(inputs: PairInputs, settings: RoundSettings, *, out: str) -> list[str]:
    """What `launch_rounds` would do and what it costs, as lines; checks the inputs, touches nothing."""
    fingerprints = check_launch(inputs, settings)
    features = Dataset.open(inputs.features, FEATURES)
    outcome = plan_stage(name=STAGE, config=_config(inputs, settings), inputs=fingerprints, out=out)
    cost = RoundCost(
        clips=_at_most(features.num_rows(inputs.split), settings.pairs.max_clips),
        candidates=settings.pairs.num_candidates,
        network_calls=settings.pairs.sampling.network_calls,
        training_steps=settings.training.options.steps,
        evaluated_clips=_at_most(features.num_rows(settings.evaluation.split), settings.evaluation.max_clips),
        evaluated_candidates=settings.evaluation.num_candidates,
        evaluation_network_calls=settings.evaluation.sampling.network_calls,
    )
    lines = plan_lines(out=out, num_rounds=settings.num_rounds, with_control=settings.with_control, cost=cost)
    return [f"{STAGE}: {outcome}, {out}", *lines]


def _at_most(count: int, limit: int | None) -> int:
    return count if limit is None else min(count, limit)


def _config(inputs: PairInputs, settings: RoundSettings) -> dict[str, Any]:
    return {**settings.affecting_bytes(), "split": inputs.split}
