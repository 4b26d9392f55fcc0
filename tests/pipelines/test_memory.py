"""The predicted memory of a training, against what real steps of the tiny size allocate, and its arithmetic."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipelines.errors import InputError
from pipelines.training.engine import Engine
from pipelines.training.memory import MemoryPlan, lowest_fitting_stage, memory_table, predict_memory, predict_stages
from pipelines.training.options import TrainingOptions
from pipelines.training.order import BatchPlan
from pipelines.training.timing import StepClock
from pipelines.training.world import World
from tests.allocations import Allocations
from tests.pipelines.test_activations import real_batch, real_trainee
from tests.training_worlds import one_of_several, start_ranks

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


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "0")
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return World(0, 1, CPU)


def _bytes_of_a_step(stage: int, accumulation: int, world: World) -> int:
    """The most that lives in a step of eight samples a micro batch: in the second, the first has no moments of AdamW.

    Watched from before the engine is made, since nothing in Python refers to the buckets of DDP.
    """
    with Allocations() as allocations:
        batch_size = 8 * world.size * accumulation
        options = TrainingOptions(
            steps=2, batch_size=batch_size, lr=1e-4, zero_stage=stage, accumulation=accumulation, clip=1.0
        )
        engine = Engine(real_trainee(), options, BatchPlan(batch_size, world.size, accumulation), world)
        engine.train(True)
        for _ in range(2):
            allocations.restart_peak()
            for micro in range(accumulation):
                last = micro == accumulation - 1
                loss, _ = engine(real_batch(8), world.gather, last=last)
                outcome = engine.backward(loss, last=last, learning_rate=1e-4, clock=StepClock(CPU))
                del loss
            assert outcome is not None
            assert outcome.applied
    engine.close()
    return allocations.peak - allocations.start


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 3))])
def test_a_real_step_of_the_engine_stays_within_a_fifth_of_the_plan(stage: int, one_rank: World) -> None:
    torch.set_num_threads(1)
    real = _bytes_of_a_step(stage, 1, one_rank)
    plan = predict_memory("tiny", zero_stage=stage, **PLAIN)
    assert 0.9 * real < plan.total < 1.2 * real, f"predicted {plan.total}, real {real}"


def _measure_without_zero(rank: int, meeting: str, found: str) -> None:
    with one_of_several(rank, 2, meeting) as world:
        measured = [_bytes_of_a_step(0, accumulation, world) for accumulation in (1, 2)]
        if world.is_main:
            Path(found).write_text(json.dumps(measured))


@pytest.mark.slow
def test_a_real_step_of_two_workers_at_stage_0_needs_what_was_predicted(tmp_path: Path) -> None:
    found = tmp_path / "found"
    start_ranks(_measure_without_zero, (str(tmp_path / "meeting"), str(found)), 2)
    real = json.loads(found.read_text())
    plans = [
        predict_memory("tiny", zero_stage=0, **PLAIN | {"world_size": 2, "accumulation": accumulation})
        for accumulation in (1, 2)
    ]
    # Less than half of what gradients take: whether they lie once or twice, or come as activations go, is told apart.
    assert [plan.total for plan in plans] == pytest.approx(real, rel=0.05)
    gradients = plans[0].gradients
    assert plans[1].total - plans[0].total == gradients
    assert real[1] - real[0] == pytest.approx(gradients, rel=0.05)


def test_zero_divides_what_it_partitions_among_the_workers_and_nothing_else() -> None:
    plans = predict_stages("small_16k", **PLAIN | {"world_size": 4, "ema": True, "batch_per_worker": 1})
    parameters, trainable = 157_283_644, 157_204_756
    for stage, plan in plans.items():
        share = 1 if stage == 0 else 4
        assert plan.optimizer == 8 * trainable / share
        assert plan.gradients == 4 * trainable / share
        assert plan.master == (0 if stage == 0 else 4 * trainable / 4)
        assert plan.average == 4 * trainable
        assert plan.weights == (4 * parameters if stage < 3 else 4 * parameters / 4 + 4 * parameters)
    assert plans[0].total > plans[2].total
    assert len({plan.activations for plan in plans.values()}) == 1


def test_several_workers_at_stage_0_hold_all_gradients_all_the_time_and_twice_where_micro_batches_add_up() -> None:
    def plan(world_size: int, **changed: Any) -> MemoryPlan:
        return predict_memory("tiny", zero_stage=0, **PLAIN | {"world_size": world_size} | changed)

    one, two = plan(1), plan(2)
    gradients = 4 * 2_202_400
    assert (one.gradients, one.buffers, one.kept) == (gradients, 0, 0)
    assert (two.gradients, two.buffers, two.kept) == (gradients, 0, gradients)
    assert two.step == two.activations + gradients > one.step
    adding = plan(2, accumulation=2)
    assert (adding.gradients, adding.buffers) == (gradients, gradients)
    assert adding.total == two.total + gradients == plan(1, accumulation=2).total + gradients
    # The parts of a preference loss are asked for beside the buckets.
    probing, alone = plan(2, reference=True), plan(1, reference=True)
    assert probing.gradients == alone.gradients + gradients
    assert probing.total == alone.total + gradients
    # In a validation the own weights lie beside the buckets.
    small = plan(2, ema=True, batch_per_worker=1, activation_checkpointing=True)
    assert small.total == small.weights + small.optimizer + small.average + 2 * gradients > small.step


def test_adapters_cost_neither_reference_nor_optimizer_of_the_whole_network() -> None:
    options = PLAIN | {"reference": True, "bf16": True, "batch_per_worker": 2, "activation_checkpointing": True}
    whole = predict_memory("small_44k", zero_stage=0, **options)
    adapted = predict_memory("small_44k", zero_stage=0, **options | {"lora_rank": 16})
    assert whole.reference == 4 * 157_409_144
    assert adapted.reference == 0
    assert adapted.optimizer < 0.05 * whole.optimizer
    assert adapted.total < 0.4 * whole.total


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing_and_bf16() -> None:
    def activations(**changed: Any) -> int:
        return predict_memory("small_16k", zero_stage=0, **PLAIN | changed).activations

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
        kept=0,
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
    assert MemoryPlan(**{**vars(calm), "kept": 15}).total == 10 + 50 + 65
    assert MemoryPlan(**{**vars(calm), "step": 70, "kept": 15}).total == 10 + 50 + 70


def test_what_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"--size huge: known sizes are tiny, small_16k"):
        predict_memory("huge", zero_stage=0, **PLAIN)
    with pytest.raises(InputError, match="--zero-stage must be 0, 1, 2 or 3, got 4"):
        predict_memory("tiny", zero_stage=4, **PLAIN)
    with pytest.raises(InputError, match="must be at least 1, got 8, 0, 1 and None"):
        predict_memory("tiny", zero_stage=0, **PLAIN | {"world_size": 0})
