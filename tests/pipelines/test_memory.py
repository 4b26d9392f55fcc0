"""The predicted memory of a training, against what real steps of the tiny size allocate, and its arithmetic."""

import gc
import os
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from models.lora import add_adapters
from models.policy import Policy
from models.preference import PreferenceLossConfig
from pipelines.errors import InputError
from pipelines.training import memory
from pipelines.training.engine import Engine
from pipelines.training.flow_matching_objective import FlowMatchingTrainee
from pipelines.training.memory import MemoryPlan, lowest_fitting_stage, memory_table, predict_memory, predict_stages
from pipelines.training.objective import Batch, Trainee
from pipelines.training.options import TrainingOptions
from pipelines.training.order import BatchPlan
from pipelines.training.preference_objective import PreferenceTrainee
from pipelines.training.world import World

CPU = torch.device("cpu")
PLAIN: dict[str, Any] = {
    "batch_per_worker": 8,
    "world_size": 1,
    "bf16": False,
    "ema": False,
    "activation_checkpointing": False,
    "reference": False,
    "lora_rank": None,
}


class Allocations(TorchDispatchMode):
    """Bytes of all living CPU tensors: at the start, and at their highest since."""

    def __init__(self) -> None:
        super().__init__()
        gc.collect()
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.live = 0
        # Not every object's attributes: some are made to warn.
        for found in [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]:
            for tensor in (found, found.grad if found.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu":
                    self._see(tensor)
        self.start = self.peak = self.live

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        known = self._known.get(storage._cdata)
        if known is None or known() is not storage:
            self._known[storage._cdata] = weakref.ref(storage)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self._see(tensor)
        self.peak = max(self.peak, self.live)
        return result


def _trainee(reference: bool = False, lora_rank: int | None = None, checkpointing: bool = False) -> Trainee:
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


def _batch(size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in memory._fake_batch("tiny", size).items()}
    batch = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    return batch | {name: batch[name] < 0.2 for name in ("drop_video", "drop_text")}


@pytest.mark.parametrize("bf16", [False, True])
def test_the_count_is_exactly_what_autograd_saves_on_real_tensors(bf16: bool) -> None:
    trainee, batch = _trainee(), _batch(3)
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
    plan = predict_memory("tiny", zero_stage=0, **PLAIN | {"batch_per_worker": 3, "bf16": bf16})
    # Whitening matrices and scalars made on the way are all that may differ.
    assert plan.activations == pytest.approx(sum(storage.nbytes() for storage in saved.values()), rel=0.005)


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
    trainee = _trainee(reference, lora_rank, checkpointing)
    start = sum(tensor.nbytes for tensor in (*trainee.parameters(), *trainee.buffers()))
    with Allocations() as allocations:
        before = allocations.start
        batch = _batch(8)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = trainee(batch, lambda tensor: tensor)
        loss.backward()
    assert start <= before
    moments = memory.count_activations(
        memory._trainee_without_memory("tiny", reference, lora_rank), "tiny", 8, bf16=bf16, checkpointing=checkpointing
    )
    predicted = max(moment.held + 4 * moment.graded for moment in moments)
    assert predicted == pytest.approx(allocations.peak - before, rel=0.12)


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "0")
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return World(0, 1, CPU)


def test_a_real_step_under_every_zero_stage_stays_within_a_fifth_of_the_plan(one_rank: World) -> None:
    torch.set_num_threads(1)
    plans = predict_stages("tiny", **PLAIN)
    for stage, plan in plans.items():
        gc.collect()
        base = Allocations().start
        options = TrainingOptions(steps=3, batch_size=8, lr=1e-4, zero_stage=stage)
        engine = Engine(_trainee(), options, BatchPlan(8, 1), one_rank)
        engine.train(True)
        for _ in range(2):
            with Allocations() as allocations:
                loss, _ = engine(_batch(8), lambda tensor: tensor)
                outcome = engine.backward(loss, last=True, learning_rate=1e-4)
            del loss
            assert outcome is not None
            assert outcome.applied
        real = allocations.peak - base
        assert 0.9 * real < plan.total < 1.2 * real, f"stage {stage}: predicted {plan.total}, real {real}"
        engine.close()
        del engine, allocations


def test_zero_divides_what_it_partitions_among_the_workers_and_nothing_else() -> None:
    plans = predict_stages("medium_44k", **PLAIN | {"world_size": 8, "ema": True, "batch_per_worker": 1})
    parameters, trainable = 621_805_944, 621_727_016
    for stage, plan in plans.items():
        share = 1 if stage == 0 else 8
        assert plan.optimizer == 8 * trainable / share
        assert plan.gradients == 4 * trainable / share
        assert plan.master == (0 if stage == 0 else 4 * trainable / 8)
        assert plan.average == 4 * trainable
        assert plan.weights == (4 * parameters if stage < 3 else 4 * parameters / 8 + 4 * parameters)
    assert plans[0].total > plans[2].total
    assert len({plan.activations for plan in plans.values()}) == 1


def test_adapters_cost_neither_reference_nor_optimizer_of_the_whole_network() -> None:
    options = PLAIN | {"reference": True, "bf16": True, "batch_per_worker": 2, "activation_checkpointing": True}
    whole = predict_memory("large_44k_v2", zero_stage=0, **options)
    adapted = predict_memory("large_44k_v2", zero_stage=0, **options | {"lora_rank": 16})
    assert whole.reference == 4 * 1_030_575_608
    assert adapted.reference == 0
    assert adapted.optimizer < 0.03 * whole.optimizer
    assert adapted.total < 0.3 * whole.total


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing_and_bf16() -> None:
    def activations(**changed: Any) -> int:
        return predict_memory("medium_44k", zero_stage=0, **PLAIN | changed).activations

    four, eight = activations(batch_per_worker=4), activations(batch_per_worker=8)
    assert eight == pytest.approx(2 * four, rel=0.01)
    assert activations(batch_per_worker=8, bf16=True) < 0.8 * eight
    assert activations(batch_per_worker=8, activation_checkpointing=True) < 0.25 * eight
    preferring = activations(batch_per_worker=4, reference=True)
    assert 0.9 * eight < preferring < 1.2 * eight


def _plan(total: int) -> MemoryPlan:
    return MemoryPlan(
        weights=total,
        master=0,
        gradients=0,
        optimizer=0,
        average=0,
        reference=0,
        activations=0,
        buffers=0,
        step=0,
    )


def test_the_lowest_stage_that_fits_leaves_a_tenth_of_the_gpu_free() -> None:
    gib = 2**30
    plans = {0: _plan(30 * gib), 1: _plan(22 * gib), 2: _plan(21 * gib), 3: _plan(20 * gib)}
    assert lowest_fitting_stage(plans, 80 * gib) == 0
    assert lowest_fitting_stage(plans, 24 * gib) == 2
    assert lowest_fitting_stage(plans, 16 * gib) is None
    lines = memory_table(plans, 24 * gib)
    assert [line.split()[-1] for line in lines[1:5]] == ["no", "no", "yes", "yes"]
    assert lines[2].split()[:2] == ["ZeRO-1", "22.00"]
    assert lines[-1] == "GPU of 24.0 GiB, 10% of it left free: --zero-stage 2 fits"
    assert "no stage fits: raise --accumulation" in memory_table(plans, 16 * gib)[-1]
    assert len(memory_table(plans)) == 5


def test_a_validation_that_swaps_the_average_in_counts_where_it_needs_more_than_a_step() -> None:
    calm = MemoryPlan(**{**vars(_plan(10)), "average": 50, "step": 20})
    assert calm.total == 10 + 50 + 50
    assert MemoryPlan(**{**vars(calm), "step": 70}).total == 10 + 50 + 70


def test_what_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"--size huge: known sizes are tiny, small_16k"):
        predict_memory("huge", zero_stage=0, **PLAIN)
    with pytest.raises(InputError, match="--zero-stage must be 0, 1, 2 or 3, got 4"):
        predict_memory("tiny", zero_stage=4, **PLAIN)
    with pytest.raises(InputError, match="must be at least 1, got 8, 0, 1 and None"):
        predict_memory("tiny", zero_stage=0, **PLAIN | {"world_size": 0})
