"""What a training would need, as lines for people; nothing is read but the options, and nothing is started."""

from pipelines.errors import InputError
from pipelines.training.memory import GIBIBYTE, memory_table, predict_stages
from pipelines.training.options import PolicyTrainingOptions
from pipelines.training.stages import open_policy, size_of


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
    share = world * options.accumulation
    if options.batch_size % share:
        raise InputError(
            f"--batch-size {options.batch_size} is no multiple of {world} workers x --accumulation "
            f"{options.accumulation}"
        )
    plans = predict_stages(
        size,
        batch_per_worker=options.batch_size // share,
        world_size=world,
        bf16=options.bf16,
        ema=options.ema_width is not None or options.ema_decay is not None,
        activation_checkpointing=options.activation_checkpointing,
        reference=reference,
        lora_rank=options.lora_rank,
        accumulation=options.accumulation,
    )
    title = f"{size}: {world} workers, {options.batch_size // share} samples at once on each; nothing was started"
    return [title, *memory_table(plans, None if gpu_gib is None else round(gpu_gib * GIBIBYTE))]


def policy_size(policy: str) -> str:
    """The size of a finished policy; raises InputError where there is none."""
    return size_of(open_policy(policy)[0])
