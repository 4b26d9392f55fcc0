"""The training engine: DeepSpeed behind five verbs (forward, backward, step, save, load). The only DeepSpeed import.

What had to be settled so that ZeRO 0, 1, 2, 3 and a plain torch loop give the same losses: the optimizer is torch's
own AdamW handed in (DeepSpeed's config names have other defaults), and at stage 0 the clipping is ours, because there
DeepSpeed neither reports a gradient norm nor skips a step whose norm is not finite. From stage 1 on it does both.
bf16 is autocast over float32 weights, MMAudio's recipe; from stage 1 on DeepSpeed keeps a float32 copy of a worker's
share of them all the same.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.training.objective import Batch, Gather, Trainee
from pipelines.training.options import TrainingOptions
from pipelines.training.order import BatchPlan
from pipelines.training.timing import StepClock
from pipelines.training.world import World

QUIET = 10**9
MAX_BUCKET_ELEMENTS = 200_000_000


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did."""

    grad_norm: float
    """Before clipping, over all ranks; NaN where the step was skipped."""
    applied: bool
    """False where the gradient was not finite: weights and optimizer are as before, on every rank."""


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for this device, without the compiler it would call on a CPU for its shared-memory op."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    if device.type == "cpu":
        # A module attribute that DeepSpeed probes lazily; given here, no compiler is looked for (0.19.8).
        operations: Any = deepspeed.ops
        operations.__compatible_ops__ = dict.fromkeys(ALL_OPS, False)
    return deepspeed


class Engine:
    """One trainee under DeepSpeed; every rank makes the same calls in the same order."""

    def __init__(self, trainee: Trainee, options: TrainingOptions, plan: BatchPlan, world: World) -> None:
        deepspeed = _import_deepspeed(world.device)
        self._gathered_parameters = deepspeed.zero.GatheredParameters
        self._stage = options.zero_stage
        self._clip = options.clip
        self.trainee = trainee.to(world.device)
        self._trainable = [parameter for parameter in trainee.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trainee.parameter_groups(options.weight_decay),
            lr=options.lr,
            betas=options.betas,
            eps=options.eps,
            fused=True,
        )
        with _plain_layout(list(trainee.parameters()), restore=options.zero_stage == 0):
            self._engine, *_ = deepspeed.initialize(
                model=trainee,
                optimizer=optimizer,
                config=_config(options, plan, sum(parameter.numel() for parameter in self._trainable)),
                dist_init_required=False,
            )
        # At stage 0 gradients are averaged after backward in any case; done by `backward` below, it can be timed.
        self._engine.enable_backward_allreduce = self._stage > 0

    def __call__(self, batch: Batch, gather: Gather) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (scalar) and metrics of a micro batch."""
        return self._engine(batch, gather)

    def train(self, mode: bool) -> None:
        """Switch training mode on or off."""
        self._engine.train(mode)

    def backward(self, loss: Tensor, *, last: bool, learning_rate: float, clock: StepClock) -> StepOutcome | None:
        """Add the gradients of one micro batch; on the `last` one clip, step, and say how it went.

        A loss that is not finite poisons the gradients on purpose: then the one check, the gradient norm after the
        reduction, sees it on every rank and all skip the same step.
        """
        # A factor and not a branch: no wait for the device.
        factor = torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
        with clock.part("backward"):
            self._engine.backward(loss * factor)
        if not last:
            self._engine.step()
            return None
        if self._stage == 0:
            with clock.part("communication"):
                self._engine.allreduce_gradients()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        with clock.part("optimizer"):
            return self._step_plain() if self._stage == 0 else self._step_zero()

    def _step_plain(self) -> StepOutcome:
        """Stage 0: gradients are whole and already averaged on every rank."""
        grads = [parameter.grad for parameter in self._trainable if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        applied = math.isfinite(norm)
        if not applied:
            for parameter in self._trainable:
                parameter.grad = None
        elif self._clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self._trainable, self._clip, torch.tensor(norm))
        self._engine.step()
        return StepOutcome(norm if applied else math.nan, applied)

    def _step_zero(self) -> StepOutcome:
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        return StepOutcome(float(self._engine.get_global_grad_norm()) if applied else math.nan, applied)

    @contextmanager
    def whole_weights(self, *, trained_alone: bool = False) -> Iterator[None]:
        """Inside, every parameter is whole on every rank, to be read; ZeRO-3 keeps them partitioned otherwise.

        `trained_alone`: only those that are trained, a small part where the rest is frozen beneath adapters.
        """
        parameters = self._trainable if trained_alone else list(self.trainee.parameters())
        with self._gathered_parameters(parameters, enabled=self._stage == 3):
            yield

    @contextmanager
    def replaced_weights(self, copy_in: Callable[[list[nn.Parameter]], None]) -> Iterator[None]:
        """Inside, the trainable parameters hold what `copy_in` wrote into them; afterwards their own values again."""
        with self.whole_weights():
            own = [parameter.detach().clone() for parameter in self._trainable]
            copy_in(self._trainable)
            try:
                yield
            finally:
                with torch.no_grad():
                    for parameter, value in zip(self._trainable, own, strict=True):
                        parameter.copy_(value)

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that are trained, in a fixed order."""
        return self._trainable

    def save(self, root: Path, name: str) -> None:
        """Write this rank's share of weights and optimizer into `root/name`; returns when all ranks have.

        Frozen weights are not written: an objective builds them again from what it starts from.
        """
        self._engine.save_checkpoint(str(root), tag=name, save_latest=False, exclude_frozen_parameters=True)

    def load(self, root: Path, name: str) -> None:
        """Restore weights and optimizer, strictly, as they were saved. Only files whose hashes were verified."""
        path, _ = self._engine.load_checkpoint(str(root), tag=name, custom_load_fn=_load_trained)
        if path is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint in {root / name}")

    def close(self) -> None:
        """Release buffers and hooks; the weights stay usable except under ZeRO-3."""
        self._engine.destroy()


def _load_trained(src: Mapping[str, Any], dst: nn.Module) -> None:
    """Load a saved state dict into the trainee: everything but frozen parameters must be there."""
    missing, unknown = dst.load_state_dict(src, strict=False)
    frozen = {name for name, parameter in dst.named_parameters() if not parameter.requires_grad}
    if unknown or set(missing) - frozen:
        raise RuntimeError(f"a checkpoint of another model: missing {sorted(set(missing) - frozen)}, unknown {unknown}")


@contextmanager
def _plain_layout(parameters: list[nn.Parameter], *, restore: bool) -> Iterator[None]:
    """Inside, weights are contiguous, since DeepSpeed cannot broadcast channels-last ones; then as they were.

    From stage 1 on DeepSpeed lays them out itself, and nothing is restored.
    """
    strides = [parameter.stride() for parameter in parameters]
    for parameter in parameters:
        # Not `contiguous()`: that keeps the odd strides of dimensions of size 1.
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    yield
    if restore:
        for parameter, stride in zip(parameters, strides, strict=True):
            laid_out = torch.empty_strided(parameter.shape, stride, dtype=parameter.dtype, device=parameter.device)
            parameter.data = laid_out.copy_(parameter.data)


def _config(options: TrainingOptions, plan: BatchPlan, num_parameters: int) -> dict[str, Any]:
    bucket = min(max(num_parameters, 1), MAX_BUCKET_ELEMENTS)
    return {
        "train_batch_size": options.batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_size,
        "gradient_accumulation_steps": options.accumulation,
        "gradient_clipping": (options.clip or 0.0) if options.zero_stage else 0.0,
        "zero_optimization": {
            "stage": options.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {"enabled": options.bf16, "dtype": "bfloat16"},
        "steps_per_print": QUIET,
        "wall_clock_breakdown": False,
    }
