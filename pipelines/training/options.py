"""The options that every training has; light to import, so that jobs take them over as their own flags."""

import math
from dataclasses import dataclass, fields

from pipelines.errors import InputError
from pipelines.training.schedule import Schedule, ScheduleName

NOT_AFFECTING_BYTES = (
    *("checkpoint_every", "keep_last", "keep_every"),
    *("max_rollbacks", "stall_timeout_s"),
    *("zero_stage", "offload"),
)
"""Where the optimizer lies changes roundings, as the number of workers does: a run goes on with another choice."""
LEFT_OUT_WHEN_OFF = ("spike_factor",)
"""Options that came later: at None a fingerprint does not name them, so earlier work keeps its own."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to train; everything here but `NOT_AFFECTING_BYTES` affects the result."""

    steps: int
    """Optimizer steps."""
    batch_size: int
    """Samples a step, over all workers and accumulation steps."""
    lr: float
    """Peak learning rate."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly."""
    schedule: ScheduleName = "constant"
    """After warm-up: constant, cosine down to zero, or two decays by ten at 80 and 90 % (steps)."""
    accumulation: int = 1
    """Micro batches a step on each worker."""
    clip: float | None = 1.0
    """Largest gradient norm; None: no clipping."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's two decay rates."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    zero_stage: int = 0
    """DeepSpeed ZeRO stage: 0 none, 1 optimizer, 2 and gradients, 3 and weights are dealt out to the workers.
    A training goes on from its checkpoint with another."""
    bf16: bool = False
    """Forward and backward under bfloat16 autocast; weights and optimizer stay float32."""
    seed: int = 0
    """Seed of initial weights, order and every draw."""
    ema_decay: float | None = None
    """Plain exponential average of the weights, validated and exported in their place; None: off."""
    ema_width: float | None = None
    """Relative width of a power-function average of the weights instead (0.05 is MMAudio's)."""
    validate_every: int = 0
    """Steps between validations; 0: only at the end."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    keep_last: int = 2
    """Checkpoints that are kept while training, besides the best one."""
    keep_every: int = 0
    """Keep also the checkpoints of every so many steps, a multiple of --checkpoint-every; 0: none."""
    max_bad_steps: int = 20
    """So many skipped steps in a row (loss or gradient not finite, or a spike) lead back to the last checkpoint."""
    max_rollbacks: int = 2
    """How often a run goes back to its last checkpoint and on with another order of the samples, before it stops."""
    spike_factor: float | None = None
    """Skip a step whose gradient norm or loss is above so many times its running median (5 is sensible); None: off."""
    stall_timeout_s: float | None = 1800.0
    """Seconds after which a worker that makes no progress is named and ended, and its group started again; None: never.
    The longest single thing of a run, a compilation or a batch from slow storage, must fit in."""
    offload: bool = False
    """Keep the optimizer's state (under ZeRO-3 the weights too) in the host's pinned memory; GPUs and ZeRO only."""

    def __post_init__(self) -> None:
        counts = (self.steps, self.batch_size, self.accumulation, self.checkpoint_every, self.keep_last)
        if min(counts) < 1:
            raise InputError(
                "--steps, --batch-size, --accumulation, --checkpoint-every and --keep-last must be at least 1"
            )
        if self.keep_every < 0 or self.keep_every % self.checkpoint_every:
            raise InputError(
                f"--keep-every {self.keep_every} must be 0 or a multiple of --checkpoint-every {self.checkpoint_every}"
            )
        if self.zero_stage not in (0, 1, 2, 3):
            raise InputError(f"--zero-stage must be 0, 1, 2 or 3, got {self.zero_stage}")
        if self.lr <= 0 or (self.clip is not None and self.clip <= 0):
            raise InputError(f"--lr and --clip must be positive, got {self.lr} and {self.clip}")
        if self.ema_decay is not None and self.ema_width is not None:
            raise InputError("--ema-decay and --ema-width are two kinds of average: give one of them")
        self._check_safety()

    def _check_safety(self) -> None:
        if self.max_bad_steps < 1 or self.max_rollbacks < 0:
            raise InputError(
                f"--max-bad-steps must be at least 1 and --max-rollbacks 0, got {self.max_bad_steps} and "
                f"{self.max_rollbacks}"
            )
        if self.spike_factor is not None and not self.spike_factor > 1:
            raise InputError(f"--spike-factor must be above 1, got {self.spike_factor:g}; 5 is sensible")
        if self.stall_timeout_s is not None and not self.stall_timeout_s > 0:
            raise InputError(f"--stall-timeout-s must be positive, got {self.stall_timeout_s:g}")
        if self.offload and self.zero_stage == 0:
            raise InputError("--offload needs ZeRO, which deals the optimizer out: give --zero-stage 1, 2 or 3 with it")

    def learning_rates(self) -> Schedule:
        """Return the schedule."""
        return Schedule(peak=self.lr, total_steps=self.steps, warmup_steps=self.warmup_steps, name=self.schedule)

    def training(self) -> "TrainingOptions":
        """Return these options alone, also from a class that adds its own."""
        return TrainingOptions(**{entry.name: vars(self)[entry.name] for entry in fields(TrainingOptions)})

    def affecting_bytes(self) -> dict[str, object]:
        """Return the options that belong into a stage's fingerprint."""
        return {
            name: value
            for name, value in sorted(vars(self).items())
            if name not in NOT_AFFECTING_BYTES and not (name in LEFT_OUT_WHEN_OFF and value is None)
        }


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Train low-rank adapters beside the frozen weights of a policy, and merge them on export (`models.lora`)."""

    rank: int
    alpha: float
    """The update is scaled by alpha / rank."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"--lora-rank must be at least 1, got {self.rank}; leave it out to train every weight")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise InputError(f"--lora-alpha must be positive, got {self.alpha}")


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a policy's network is run while it trains: the same mathematics, so none of it enters a fingerprint.

    Activation checkpointing repeats the same operations and does not change a bit on a CPU; compiled blocks round
    otherwise, as another device or number of workers does. So a training that ran out of memory, or is to be faster,
    goes on from its last checkpoint with another choice.
    """

    activation_checkpointing: bool = False
    compile: bool = False


@dataclass(frozen=True, kw_only=True)
class PolicyTrainingOptions(TrainingOptions):
    """How to train a policy: what every training has, and what makes the big sizes fit."""

    lora_rank: int | None = None
    """Train low-rank adapters of this rank beside the frozen weights, merged on export; None: train every weight."""
    lora_alpha: float | None = None
    """The adapters' update is scaled by this over the rank; None: by 1."""
    activation_checkpointing: bool = False
    """Compute each block again in the backward pass: a third more work, and memory for one block's activations."""
    compile: bool = False
    """Compile each block; minutes at the start, faster steps on a GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lora()

    def lora(self) -> LoRA | None:
        """Return the adapters that are asked for.

        Raises:
            InputError: a rank or an alpha that cannot be, or an alpha without a rank.
        """
        if self.lora_rank is None:
            if self.lora_alpha is not None:
                raise InputError(f"--lora-alpha {self.lora_alpha:g} scales adapters: give --lora-rank too")
            return None
        return LoRA(rank=self.lora_rank, alpha=float(self.lora_rank) if self.lora_alpha is None else self.lora_alpha)

    def execution(self) -> Execution:
        """Return how the network is run."""
        return Execution(activation_checkpointing=self.activation_checkpointing, compile=self.compile)
