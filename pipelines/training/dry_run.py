"""What a training would need, as lines for people; nothing is read but the options, and nothing is started."""

from dataclasses import replace

from pipelines.training.activations import fake_batch, trainee_without_memory
from pipelines.training.adjustments import Adjustments
from pipelines.training.flops import count_flops
from pipelines.training.gpus import GPUS, GpuName
from pipelines.training.memory import GIBIBYTE, memory_table, predict_stages
from pipelines.training.options import PolicyTrainingOptions
from pipelines.training.order import BatchPlan
from pipelines.training.stages import open_policy, size_of
from pipelines.training.worker_range import NumWorkers, WorkerRange

ASSUMED_MFU = 0.3
"""Share of a GPU's peak that the estimate of hours reckons with; a run shows its own as `mfu`."""


def memory_lines(
    size: str, options: PolicyTrainingOptions, *, num_workers: int, reference: bool, gpu_gib: float | None
) -> list[str]:
    """Memory of one worker under every ZeRO stage.

    Args:
        size: the policy's.
        options: as for the training.
        num_workers: 0 counts as one.
        reference: it is a preference training, with winner, loser and a frozen reference.
        gpu_gib: memory of a GPU, to say which stage fits it.

    Raises:
        InputError: the batch cannot be dealt out to the workers.
    """
    world = max(num_workers, 1)
    plan = BatchPlan(options.batch_size, world, options.accumulation)
    plans = predict_stages(
        size,
        batch_per_worker=plan.micro_size,
        world_size=world,
        bf16=options.bf16,
        ema=options.ema_width is not None or options.ema_decay is not None,
        activation_checkpointing=options.activation_checkpointing,
        reference=reference,
        lora_rank=options.lora_rank,
        accumulation=options.accumulation,
    )
    title = f"{size}: {world} workers, {plan.micro_size} samples at once on each; nothing was started"
    return [title, *memory_table(plans, None if gpu_gib is None else round(gpu_gib * GIBIBYTE))]


def dry_run_lines(
    size: str,
    options: PolicyTrainingOptions,
    *,
    num_workers: NumWorkers,
    reference: bool,
    gpu: GpuName | None,
    gpu_gib: float | None,
) -> list[str]:
    """Memory as `memory_lines` says it, and with a `gpu` the hours as `hours_lines` does.

    Of a range of workers both ends are told.

    Raises:
        InputError: the batch cannot be dealt out to the workers.
    """
    if gpu is not None and gpu_gib is None:
        gpu_gib = GPUS[gpu].memory_gib
    workers = WorkerRange.of(num_workers)
    workers.check_batch(options.batch_size, options.accumulation)
    lines: list[str] = []
    for number in sorted({workers.least, workers.most}):
        plan = Adjustments().plan(
            options.batch_size, max(number, 1), options.accumulation, most_workers=max(workers.most, 1)
        )
        dealt = replace(options, accumulation=plan.accumulation)
        lines += memory_lines(size, dealt, num_workers=number, reference=reference, gpu_gib=gpu_gib)
        if gpu is not None:
            lines += hours_lines(size, options, num_workers=number, reference=reference, gpu=gpu)
    return lines


def hours_lines(
    size: str, options: PolicyTrainingOptions, *, num_workers: int, reference: bool, gpu: GpuName
) -> list[str]:
    """How long the steps would take on GPUs of one kind, reckoned from counted operations; an estimate, and it says so.

    Args:
        size: the policy's.
        options: as for the training.
        num_workers: GPUs; 0 counts as one.
        reference: as for `memory_lines`.
        gpu: what the workers have.
    """
    world, known = max(num_workers, 1), GPUS[gpu]
    trainee = trainee_without_memory(size, reference=reference, lora_rank=options.lora_rank)
    counted = count_flops(trainee, fake_batch(size, 1))
    if counted is None:
        raise RuntimeError("the loss of a policy looks at values")
    recomputed = 4 / 3 if options.activation_checkpointing else 1.0
    kind, tflops = ("bf16", known.bf16_tflops) if options.bf16 else ("fp32", known.fp32_tflops)
    step_s = recomputed * options.batch_size * counted / (world * tflops * 1e12 * ASSUMED_MFU)
    what = "pair" if reference else "sample"
    return [
        f"{counted / 1e9:.1f} GFLOP a {what}, forward and backward; {options.batch_size} a step, {options.steps} steps"
        + (", a third more for what is computed again" if options.activation_checkpointing else ""),
        f"on {world} x {gpu} about {options.batch_size / step_s:.0f} {what}s/s, {step_s:.3f} s a step, "
        f"{step_s * options.steps / 3600:.1f} h. An estimate: {ASSUMED_MFU:.0%} of the peak of {tflops:g} TFLOP/s in "
        f"{kind} is assumed; communication, validations, checkpoints and the start are not in it",
    ]


def policy_size(policy: str) -> str:
    """The size of a finished policy; raises InputError where there is none."""
    return size_of(open_policy(policy)[0])
