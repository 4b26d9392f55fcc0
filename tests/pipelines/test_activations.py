"""The activations that are counted without memory, against what real tensors of the tiny size take."""

import pytest
import torch
from torch import Tensor

from models.lora import add_adapters
from models.policy import Policy
from models.preference import PreferenceLossConfig
from pipelines.training.activations import count_activations, fake_batch, trainee_without_memory
from pipelines.training.flow_matching_objective import FlowMatchingTrainee
from pipelines.training.objective import Batch, Trainee
from pipelines.training.preference_objective import PreferenceTrainee
from tests.allocations import Allocations


def real_trainee(reference: bool = False, lora_rank: int | None = None, checkpointing: bool = False) -> Trainee:
    policy = Policy.create("tiny", seed=0)
    policy.network.latent_mean.data.zero_()
    policy.network.latent_std.data.fill_(1)
    for buffer in (policy.transform.mean, policy.transform.projection):  # pyright: ignore[reportAttributeAccessIssue]
        buffer.fill_(0.1)
    if lora_rank is not None:
        add_adapters(policy.network, lora_rank, lora_rank, seed=0)
    policy.network.checkpoint_activations = checkpointing
    if reference:
        return PreferenceTrainee(policy, None, PreferenceLossConfig(kappa=1.0), None).train()
    return FlowMatchingTrainee(policy).train()


def real_batch(size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in fake_batch("tiny", size).items()}
    batch = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    return batch | {name: batch[name] < 0.2 for name in ("drop_video", "drop_text")}


@pytest.mark.parametrize("bf16", [False, True])
def test_the_count_is_exactly_what_autograd_saves_on_real_tensors(bf16: bool) -> None:
    trainee, batch = real_trainee(), real_batch(3)
    own = {tensor.untyped_storage()._cdata for tensor in (*trainee.parameters(), *trainee.buffers())}
    saved = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in batch.values()}

    def save(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        trainee(batch, lambda tensor: tensor)
    fake = trainee_without_memory("tiny", reference=False, lora_rank=None)
    counted = count_activations(fake, "tiny", 3, bf16=bf16, checkpointing=False)[0]
    # Whitening matrices and scalars made on the way are all that may differ.
    assert counted.held == pytest.approx(sum(storage.nbytes() for storage in saved.values()), rel=0.005)


@pytest.mark.parametrize(
    ("bf16", "checkpointing", "reference", "lora_rank"),
    [
        (True, False, False, None),
        (False, True, False, None),
        (True, True, True, None),
        (False, False, True, 8),
    ],
)
def test_forward_and_backward_need_what_was_predicted(
    bf16: bool, checkpointing: bool, reference: bool, lora_rank: int | None
) -> None:
    torch.set_num_threads(1)
    trainee = real_trainee(reference, lora_rank, checkpointing)
    start = sum(tensor.nbytes for tensor in (*trainee.parameters(), *trainee.buffers()))
    with Allocations() as allocations:
        before = allocations.start
        batch = real_batch(8)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = trainee(batch, lambda tensor: tensor)
        loss.backward()
    assert start <= before
    moments = count_activations(
        trainee_without_memory("tiny", reference=reference, lora_rank=lora_rank),
        "tiny",
        8,
        bf16=bf16,
        checkpointing=checkpointing,
    )
    predicted = max(moment.held + 4 * moment.graded for moment in moments)
    assert predicted == pytest.approx(allocations.peak - before, rel=0.12)
