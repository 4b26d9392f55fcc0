"""How much memory a worker needs to train a policy: predicted before anything is started, a dry run on no data.

Activations are counted (`pipelines.training.activations`), the rest is arithmetic: float32 weights, gradients and
averages 4 bytes a parameter, AdamW 8, divided among the workers as ZeRO says (Rajbhandari et al. 2020, arXiv
1910.02054), with what DeepSpeed 0.19 adds to that: from stage 1 on a float32 master copy of the share that a worker
updates, although the weights are float32 already, and buffers. At stage 0 with several workers gradients lie in the
buckets of torch's DDP (`pipelines.training.overlap`), which are there from the first step to the last. Not in it: the
CUDA context, workspaces of libraries and fragmentation (see `FREE_SHARE`), and what compiled blocks do.

Compared with the tensors that real steps allocate on a CPU (tiny and small_16k, every stage, one and two workers,
float32 and bfloat16): 3 % below to 12 % above. Stage 0 with two workers, also with micro batches that add up: 2 % below
to 2 % above at tiny, within 0.2 % at small_16k. A tiny preference training that probes gradients: 15 to 20 % above.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from models.mmdit import SIZES
from pipelines.errors import InputError
from pipelines.evaluation.tables import align
from pipelines.training.activations import Moment, count_activations, num_trained, trainee_without_memory
from pipelines.training.engine import MAX_BUCKET_ELEMENTS

ZERO_STAGES = (0, 1, 2, 3)
GIBIBYTE = 2**30
FREE_SHARE = 0.1
"""Share of a GPU that a plan leaves free: context, workspaces of the libraries, fragmentation."""
FLOAT32, ADAMW = 4, 8
"""Bytes a parameter: of a value, of AdamW's two moments."""
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default of parameters that ZeRO-3 keeps gathered."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on one worker, by what holds them."""

    weights: int
    """Under ZeRO-3 a worker's share, and what is gathered of the others' at once."""
    master: int
    """DeepSpeed's own copy of the weights that a worker updates, stages 1 to 3."""
    gradients: int
    optimizer: int
    average: int
    """Moving average of the weights, whole on every worker."""
    reference: int
    """The frozen start of a preference round; adapters need none."""
    activations: int
    """At their highest, with the batch."""
    buffers: int
    """In which gradients are reduced, where they are not the gradients themselves."""
    step: int
    """Activations, gradients and buffers at their highest together: these come as those go."""
    kept: int
    """Of gradients and buffers, what stays between steps."""

    @property
    def total(self) -> int:
        """The most at one time: in a step, or in a validation, which swaps the average in and keeps the own weights."""
        standing = self.weights + self.master + self.optimizer + self.average + self.reference
        return standing + max(self.step, self.kept + self.average)

    def fits(self, gpu_bytes: int) -> bool:
        """Whether a GPU of so much memory holds it with `FREE_SHARE` to spare."""
        return self.total <= (1 - FREE_SHARE) * gpu_bytes


def predict_memory(
    size: str,
    *,
    batch_per_worker: int,
    world_size: int,
    zero_stage: int,
    bf16: bool,
    ema: bool,
    activation_checkpointing: bool,
    reference: bool,
    lora_rank: int | None,
    accumulation: int = 1,
) -> MemoryPlan:
    """Predict what one worker needs to train a policy of a named size under one ZeRO stage.

    Args:
        size: a name in `models.mmdit.SIZES`.
        batch_per_worker: samples (pairs, with `reference`) of one micro batch.
        world_size: workers.
        zero_stage: 0 to 3.
        bf16: forward and backward under bfloat16 autocast.
        ema: a moving average of the weights is kept.
        activation_checkpointing: blocks are computed again in backward.
        reference: preference training (DPO-FM): winner and loser in one batch, a frozen second network unless adapters
            are trained, and now and then the gradients of both loss parts side by side.
        lora_rank: adapters of this rank are trained and nothing else; None: every weight.
        accumulation: micro batches a step; from the second on all gradients are there beside all activations.

    Raises:
        InputError: no such size or stage, or a count below 1.
    """
    if zero_stage not in ZERO_STAGES:
        raise InputError(f"--zero-stage must be 0, 1, 2 or 3, got {zero_stage}")
    plans = predict_stages(
        size,
        batch_per_worker=batch_per_worker,
        world_size=world_size,
        bf16=bf16,
        ema=ema,
        activation_checkpointing=activation_checkpointing,
        reference=reference,
        lora_rank=lora_rank,
        accumulation=accumulation,
    )
    return plans[zero_stage]


def predict_stages(
    size: str,
    *,
    batch_per_worker: int,
    world_size: int,
    bf16: bool,
    ema: bool,
    activation_checkpointing: bool,
    reference: bool,
    lora_rank: int | None,
    accumulation: int = 1,
) -> dict[int, MemoryPlan]:
    """Predict as `predict_memory` for every ZeRO stage, with one count of the activations (about a second)."""
    if size not in SIZES:
        raise InputError(f"--size {size}: known sizes are {', '.join(SIZES)}")
    if min(batch_per_worker, world_size, accumulation, 1 if lora_rank is None else lora_rank) < 1:
        raise InputError(
            f"batch per worker, workers, accumulation and adapter rank must be at least 1, got {batch_per_worker}, "
            f"{world_size}, {accumulation} and {lora_rank}"
        )
    trainee = trainee_without_memory(size, reference=reference, lora_rank=lora_rank)
    moments = count_activations(trainee, size, batch_per_worker, bf16=bf16, checkpointing=activation_checkpointing)
    every, trained = sum(parameter.numel() for parameter in trainee.parameters()), num_trained(trainee)
    plans = {}
    for stage in ZERO_STAGES:
        share = 1 if stage == 0 else world_size
        # One worker gathers nothing: its share is the whole.
        gathered = min(every, LIVE_PARAMETERS) if share > 1 else 0
        buckets = FLOAT32 * trained if stage == 0 and world_size > 1 else 0
        gradients, together = _gradient_bytes(
            moments, trained, share, in_buckets=buckets > 0, probing=reference, accumulating=accumulation > 1
        )
        # Gradients of a micro batch that is not averaged yet are no views of the buckets, and add up beside them.
        views, apart = (0, buckets) if accumulation > 1 else (buckets, 0)
        buffers = apart + _buffer_bytes(trained, stage, bf16)
        plans[stage] = MemoryPlan(
            weights=FLOAT32 * (every if stage < 3 else -(-every // share) + gathered),
            master=0 if stage == 0 else -(-FLOAT32 * trained // share),
            gradients=views + gradients,
            optimizer=-(-ADAMW * trained // share),
            average=FLOAT32 * trained if ema else 0,
            reference=FLOAT32 * every if reference and lora_rank is None else 0,
            activations=max(moment.held for moment in moments),
            buffers=buffers,
            step=together + views + buffers,
            kept=buckets,
        )
    return plans


def _gradient_bytes(
    moments: Sequence[Moment], trained: int, share: int, *, in_buckets: bool, probing: bool, accumulating: bool
) -> tuple[int, int]:
    """Bytes of gradients outside of DDP's buckets, and of these and activations together, at their highest."""
    gradients = -(-FLOAT32 * trained // share)
    held = max(moment.held for moment in moments)
    together = max(moment.held + FLOAT32 * moment.graded // share for moment in moments)
    if accumulating:
        together = held + gradients
    elif in_buckets:
        gradients, together = 0, held
    if probing:
        # The gradients of both loss parts, which autograd is asked for directly: whole on every worker.
        probed = FLOAT32 * trained + max(moment.held + FLOAT32 * moment.graded for moment in moments)
        gradients, together = max(gradients, 2 * FLOAT32 * trained), max(together, probed)
    return gradients, together


def lowest_fitting_stage(plans: Mapping[int, MemoryPlan], gpu_bytes: int) -> int | None:
    """Find the lowest ZeRO stage, which is the fastest, whose plan fits a GPU; None: none does."""
    return next((stage for stage in sorted(plans) if plans[stage].fits(gpu_bytes)), None)


def memory_table(plans: Mapping[int, MemoryPlan], gpu_bytes: int | None = None) -> list[str]:
    """Lines for people: GiB on one worker by ZeRO stage; with the memory of a GPU, which stages fit it."""
    names = [entry.name for entry in fields(MemoryPlan) if entry.name not in ("step", "kept")]
    header = ["GiB a worker", *names, "most at once", *(["fits"] if gpu_bytes else [])]
    rows = [
        [
            f"ZeRO-{stage}",
            *(f"{vars(plan)[name] / GIBIBYTE:.2f}" for name in names),
            f"{plan.total / GIBIBYTE:.2f}",
            *(["yes" if plan.fits(gpu_bytes) else "no"] if gpu_bytes else []),
        ]
        for stage, plan in sorted(plans.items())
    ]
    lines = align([header, *rows])
    if gpu_bytes:
        stage = lowest_fitting_stage(plans, gpu_bytes)
        advice = (
            f"--zero-stage {stage} fits"
            if stage is not None
            else "no stage fits: raise --accumulation, add workers, or give --activation-checkpointing or --lora-rank"
        )
        lines.append(f"GPU of {gpu_bytes / GIBIBYTE:.1f} GiB, {FREE_SHARE:.0%} of it left free: {advice}")
    return lines


def _buffer_bytes(trained: int, stage: int, bf16: bool) -> int:
    """What DeepSpeed needs to reduce gradients, at its highest.

    Nothing at stage 0, where it reduces nothing. From stage 1 on it fills buckets of the engine's size, and beside
    them lie the gradients on their way in and out; how much that is in buckets was measured, and under autocast there
    are buckets of both dtypes.
    """
    if stage == 0:
        return 0
    bucket = FLOAT32 * min(trained, MAX_BUCKET_ELEMENTS)
    buckets = 2.75 if stage == 3 else 2.25 if bf16 else 1.5
    return round(buckets * bucket)
