"""The training engine: DeepSpeed behind five verbs (forward, backward, step, save, load). The only DeepSpeed import.

What had to be settled so that ZeRO 0, 1, 2, 3 and a plain torch loop give the same losses: the optimizer is torch's
own AdamW handed in (DeepSpeed's config names have other defaults), and at stage 0 the clipping is ours, because there
DeepSpeed neither reports a gradient norm nor skips a step whose norm is not finite. From stage 1 on it does both. Also
at stage 0, DDP averages the gradients (`overlap`).
bf16 is autocast over float32 weights, MMAudio's recipe; from stage 1 on DeepSpeed keeps a float32 copy of a worker's
share of them all the same.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import getclosurevars
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.errors import InputError
from pipelines.training.fragments import Fragments, HostCopy, copy_to_host
from pipelines.training.objective import Batch, Gather, Trainee
from pipelines.training.options import TrainingOptions
from pipelines.training.order import BatchPlan
from pipelines.training.overlap import OverlappedAverage
from pipelines.training.ownership import Ownership
from pipelines.training.timing import StepClock
from pipelines.training.world import World

NormTest = Callable[[float], bool]
"""Whether a gradient norm (before clipping, over all ranks) is too large to step with; the same on every rank."""

QUIET = 10**9
MAX_BUCKET_ELEMENTS = 200_000_000


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did."""

    grad_norm: float
    """Before clipping, over all ranks; NaN where it was not finite or never computed."""
    applied: bool
    """False where the step was skipped: weights and optimizer are as before, on every rank."""
    spike: bool = False
    """Skipped although everything was finite."""


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
        world.pulse.at(0, "engine")
        self._gathered_parameters = deepspeed.zero.GatheredParameters
        self._stage = options.zero_stage
        self._clip = options.clip
        self._is_spike: NormTest = _never
        self._spike_norm: float | None = None
        self.trainee = trainee.to(world.device)
        self._statistics = [
            buffer
            for module in trainee.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for buffer in module.buffers(recurse=False)
        ]
        trained = {name: parameter for name, parameter in trainee.named_parameters() if parameter.requires_grad}
        self._trainable = list(trained.values())
        self._shapes = {name: list(parameter.shape) for name, parameter in trained.items()}
        self._is_main = world.is_main
        optimizer = torch.optim.AdamW(
            trainee.parameter_groups(options.weight_decay),
            lr=options.lr,
            betas=options.betas,
            eps=options.eps,
            fused=True,
        )
        # ZeRO-3 puts its own in its place, for the whole process: it rounds otherwise.
        self._torch_linear = torch.nn.functional.linear
        with _plain_layout(list(trainee.parameters()), restore=options.zero_stage == 0):
            self._engine, *_ = deepspeed.initialize(
                model=trainee,
                optimizer=optimizer,
                config=_config(options, plan, sum(parameter.numel() for parameter in self._trainable)),
                dist_init_required=False,
            )
        self._ownership = Ownership(self._engine, trained, options.zero_stage, world.rank, world.size)
        if options.spike_factor is not None and self._stage > 0:
            self._let_zero_skip_spikes()
        self._engine.enable_backward_allreduce = self._stage > 0
        overlapped = self._stage == 0 and world.size > 1
        self._overlapped = OverlappedAverage(self._engine, world) if overlapped else None

    def __call__(self, batch: Batch, gather: Gather, *, last: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (scalar) and metrics of a micro batch, the `last` of its step or not."""
        if self._overlapped is None or not torch.is_grad_enabled():
            return self._engine(batch, gather)
        return self._overlapped(batch, gather, last=last)

    def batch_statistics(self) -> list[Tensor]:
        """Return copies of what batch norm has gathered, which forward passes change without any step."""
        return [buffer.clone() for buffer in self._statistics]

    def restore_batch_statistics(self, kept: list[Tensor]) -> None:
        """Make them again what `batch_statistics` returned."""
        for buffer, value in zip(self._statistics, kept, strict=True):
            buffer.copy_(value)

    def train(self, mode: bool) -> None:
        """Switch training mode on or off."""
        self._engine.train(mode)

    def backward(
        self,
        loss: Tensor,
        *,
        last: bool,
        learning_rate: float,
        clock: StepClock,
        is_spike: NormTest | None = None,
    ) -> StepOutcome | None:
        """Add the gradients of one micro batch; on the `last` one clip, step, and say how it went.

        A step whose gradient norm `is_spike` finds too large is skipped.

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
        if self._overlapped is not None and (waited_s := self._overlapped.waited_s()) is not None:
            clock.took("communication", waited_s)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._is_spike, self._spike_norm = is_spike or _never, None
        with clock.part("optimizer"):
            return self._step_plain() if self._stage == 0 else self._step_zero()

    def _step_plain(self) -> StepOutcome:
        """Stage 0: gradients are whole and already averaged on every rank."""
        grads = [parameter.grad for parameter in self._trainable if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        spike = math.isfinite(norm) and self._is_spike(norm)
        applied = math.isfinite(norm) and not spike
        if not applied:
            for parameter in self._trainable:
                parameter.grad = None
        elif self._clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self._trainable, self._clip, torch.tensor(norm))
        self._engine.step()
        return StepOutcome(norm if math.isfinite(norm) else math.nan, applied, spike)

    def _step_zero(self) -> StepOutcome:
        self._engine.step()
        if self._spike_norm is not None:
            return StepOutcome(self._spike_norm, applied=False, spike=True)
        applied = bool(self._engine.was_step_applied())
        return StepOutcome(float(self._engine.get_global_grad_norm()) if applied else math.nan, applied)

    def _let_zero_skip_spikes(self) -> None:
        """Have DeepSpeed treat a spike as it treats an overflow: nothing is stepped, gradients are cleared.

        Its optimizers compute the norm inside their step. The one call between the norm and what they do with it is
        `_update_scale`, whose argument, the attribute `overflow`, they look at again afterwards (0.19.8; stages 1, 2
        and 3). The norm is computed once more for it.
        """
        optimizer = self._engine.optimizer
        update_scale = optimizer._update_scale

        def update_scale_or_skip(has_overflow: bool = False) -> None:
            if not has_overflow:
                norm = float(self._zero_norm(optimizer))
                if self._is_spike(norm):
                    self._spike_norm, optimizer.overflow = norm, True
            update_scale(optimizer.overflow)

        optimizer._update_scale = update_scale_or_skip

    def _zero_norm(self, optimizer: Any) -> Tensor:
        if self._stage < 3:
            return optimizer.scaled_global_norm()
        from deepspeed.runtime.zero.stage3 import combine_grad_norm_groups

        return combine_grad_norm_groups(optimizer._get_norm_groups())

    def is_finite(self) -> bool:
        """Whether every weight that is trained is finite; inside `whole_weights`, the same on every rank."""
        return bool(torch.stack([parameter.detach().isfinite().all() for parameter in self._trainable]).all())

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

    def host_copy(self) -> HostCopy:
        """Copy this rank's share of weights and optimizer to host memory, on rank 0 also the buffers.

        Frozen weights are not in it: an objective builds them again from what it starts from.
        """
        return copy_to_host(self._ownership.owned(), self._buffers() if self._is_main else {}, self._shapes)

    def load(self, paths: list[Path]) -> None:
        """Restore weights, optimizer and buffers from the files of all ranks of any world and any ZeRO stage.

        Raises:
            InputError: they are of another model, or incomplete.
        """
        with ExitStack() as stack:
            fragments = Fragments(paths, self._shapes, stack)
            self._ownership.load(fragments)
            saved, own = dict(fragments.buffers()), self._buffers()
            if saved.keys() != own.keys():
                raise InputError(f"{paths[0].parent}: other buffers than the model's: {sorted({*saved} ^ {*own})}")
            for name, value in saved.items():
                own[name].copy_(value)

    def _buffers(self) -> dict[str, Tensor]:
        """Return the buffers that belong to the model's state, by name."""
        state = self.trainee.state_dict()
        return {name: buffer for name, buffer in self.trainee.named_buffers() if name in state}

    def close(self) -> None:
        """Release buffers and hooks; the weights stay usable except under ZeRO-3."""
        if self._overlapped is not None:
            self._overlapped.close()
        self._engine.destroy()
        torch.nn.functional.linear = self._torch_linear
        if self._stage == 3:
            _forget_zero_3(self.trainee)


def _forget_zero_3(trainee: nn.Module) -> None:
    """Take a model out of the two places where DeepSpeed's ZeRO-3 keeps every model of a process for ever (0.19.8).

    A worker trains one model after another; without this the memory of each stays taken.
    """
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    own = set(trainee.modules())
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module not in own]
    # A cache on a private method, behind a decorator that does not say what it wraps.
    decorated: Any = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    getclosurevars(decorated).nonlocals["func"].cache_clear()


def _never(norm: float) -> bool:
    return False


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
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": (options.clip or 0.0) if options.zero_stage else 0.0,
        "zero_optimization": {
            "stage": options.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            **_offload(options),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {"enabled": options.bf16, "dtype": "bfloat16"},
        "steps_per_print": QUIET,
        "wall_clock_breakdown": False,
    }


def _offload(options: TrainingOptions) -> dict[str, Any]:
    """Where optimizer and weights lie; pinned, so that copies to and from the GPU overlap its work."""
    if not options.offload:
        return {}
    host = {"device": "cpu", "pin_memory": True}
    return {"offload_optimizer": host, **({"offload_param": host} if options.zero_stage == 3 else {})}
