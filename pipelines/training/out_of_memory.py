"""Memory that ran out in a step: what it looks like, and the smaller micro batch that the run goes on with.

A rank that meets it cannot ask the others, which wait for it inside a collective of the backward pass. So it records
the smaller micro batch beside the checkpoints and leaves; the group starts again and deals the same global batch out
in more micro batches. What the kernel's OOM killer ends is no error of ours: that is a dead worker.
"""

import gc

import torch

from pipelines.data.storage import Location
from pipelines.errors import EnvironmentFailed, PipelineError
from pipelines.training.adjustments import MemoryRanOut, read_adjustments, write_adjustments

TEXTS = ("DefaultCPUAllocator", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED", "std::bad_alloc")
"""What the CPU's allocator (Linux, Windows), cuBLAS and C++ say in plain RuntimeErrors."""
ADVICE = (
    "give more workers, a higher --zero-stage, --bf16 or (for a policy) --activation-checkpointing or --lora-rank; "
    "--dry-run says what fits"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that an allocation was refused, on a device or in the host's memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    is_plain = isinstance(error, RuntimeError) and not isinstance(error, PipelineError)
    return is_plain and any(text in str(error) for text in TEXTS)


def halve_micro_batch(out: str, folder: Location, micro_size: int, *, loss_is_mean: bool) -> MemoryRanOut:
    """Record that micro batches of `micro_size` samples did not fit; return what the rank is to raise.

    Args:
        out: the training's folder, for the message.
        folder: of its checkpoints.
        micro_size: samples of one forward on this rank.
        loss_is_mean: the loss of a batch is the mean over its samples, whatever else is in it.

    Raises:
        EnvironmentFailed: one sample did not fit either, or a smaller micro batch would be another loss.
    """
    if not loss_is_mean:
        raise EnvironmentFailed(
            f"{out}: out of memory with {micro_size} samples on a worker. This loss compares the samples of a batch "
            "with each other, so smaller micro batches would change what is learned and nothing was changed: "
            f"{ADVICE}; or start anew with a higher --accumulation"
        )
    if micro_size == 1:
        raise EnvironmentFailed(f"{out}: out of memory with one sample at a time on a worker: {ADVICE}")
    known = read_adjustments(folder)
    smaller = min(micro_size // 2, known.max_micro_size or micro_size)
    write_adjustments(folder, known.merged(type(known)(max_micro_size=smaller)))
    return MemoryRanOut(f"out of memory with {micro_size} samples on a worker, going on with {smaller}")


def release_memory(device: torch.device) -> None:
    """Give back what a run that is gone has left behind, so that the next one finds it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
