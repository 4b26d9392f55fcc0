"""How much memory a worker needs to train a policy: predicted before anything is started, a dry run on no data.

Activations are counted and not guessed: one forward of the real loss at the real batch on fake tensors (shapes and
dtypes without memory), summing what autograd saves for backward. Under bfloat16 that includes the cast copies of the
weights, which no batch size makes smaller. What stays is arithmetic: float32 weights, gradients and averages 4 bytes a
parameter, AdamW 8, divided among the workers as ZeRO says (Rajbhandari et al. 2020, arXiv 1910.02054), with what
DeepSpeed 0.19 adds to that: from stage 1 on a float32 master copy of the share a worker updates, although the weights
are float32 already, and buckets. Sums of peaks that need not coincide: compared with the allocations of real steps
(tiny and small_16k, stages 0 to 3, one and two workers) 7 % below to 8 % above. Not in it: the CUDA context, workspaces
and fragmentation (see `FREE_SHARE`), and what compiled blocks do.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from models.latent_transform import ChannelTransform, Whitening
from models.lora import add_adapters
from models.mmdit import SIZES, SPEC_OF_SIZE, MMDiT
from models.policy import Policy
from models.preference import PreferenceLossConfig
from models.spec import SPECS
from pipelines.errors import InputError
from pipelines.evaluation.tables import align
from pipelines.training.engine import MAX_BUCKET_ELEMENTS
from pipelines.training.flow_matching_objective import FlowMatchingTrainee
from pipelines.training.objective import Batch, Trainee
from pipelines.training.preference_objective import PreferenceTrainee

ZERO_STAGES = (0, 1, 2, 3)
GIBIBYTE = 2**30
FREE_SHARE = 0.1
"""Share of a GPU that a plan leaves free: context, workspaces of the libraries, fragmentation."""
FLOAT32, BFLOAT16, ADAMW = 4, 2, 8
"""Bytes a parameter: of a value, of a cast copy, of AdamW's two moments."""
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default of parameters that ZeRO-3 keeps gathered."""
FLAT_ELEMENTS = 500_000_000
"""DeepSpeed's limit of a flat buffer at stage 0."""


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
    """In which gradients are reduced."""
    step: int
    """Activations, gradients and buffers at their highest together: these come as those go."""

    @property
    def total(self) -> int:
        """The most at one time: in a step, or in a validation, which swaps the average in and keeps the own weights."""
        standing = self.weights + self.master + self.optimizer + self.average + self.reference
        return standing + max(self.step, self.average)

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
    trainee = _trainee_without_memory(size, reference, lora_rank)
    moments = count_activations(trainee, size, batch_per_worker, bf16=bf16, checkpointing=activation_checkpointing)
    every, trained = sum(parameter.numel() for parameter in trainee.parameters()), _trained(trainee)
    plans = {}
    for stage in ZERO_STAGES:
        share = 1 if stage == 0 else world_size
        # One worker gathers nothing: its share is the whole.
        gathered = min(every, LIVE_PARAMETERS) if share > 1 else 0
        gradients, together = _gradient_bytes(moments, trained, share, probing=reference, accumulating=accumulation > 1)
        buffers = _buffer_bytes(trained, stage, bf16)
        plans[stage] = MemoryPlan(
            weights=FLOAT32 * (every if stage < 3 else -(-every // share) + gathered),
            master=0 if stage == 0 else -(-FLOAT32 * trained // share),
            gradients=gradients,
            optimizer=-(-ADAMW * trained // share),
            average=FLOAT32 * trained if ema else 0,
            reference=FLOAT32 * every if reference and lora_rank is None else 0,
            activations=max(moment.held for moment in moments),
            buffers=buffers,
            # Stage 0 reduces after backward, when no activation is left.
            step=together + buffers if stage else max(together, FLOAT32 * trained + buffers),
        )
    return plans


def _gradient_bytes(
    moments: Sequence["Moment"], trained: int, share: int, *, probing: bool, accumulating: bool
) -> tuple[int, int]:
    """Bytes of gradients, and of gradients and activations together, at their highest."""
    gradients = -(-FLOAT32 * trained // share)
    held = max(moment.held for moment in moments)
    together = max(moment.held + FLOAT32 * moment.graded // share for moment in moments)
    if accumulating:
        together = held + gradients
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
    names = [entry.name for entry in fields(MemoryPlan) if entry.name != "step"]
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


@dataclass(frozen=True)
class Moment:
    """One moment of a micro batch: between forward and backward, or while one part of the network goes backward."""

    held: int
    """Bytes that autograd holds, the batch included."""
    graded: int
    """Parameters whose gradient exists by then."""


def count_activations(trainee: Trainee, size: str, batch: int, *, bf16: bool, checkpointing: bool) -> list[Moment]:
    """Count what autograd holds for the backward of one micro batch, from the end of forward to the end of backward.

    Args:
        trainee: the loss and its network on the meta device.
        size: the network's size.
        batch: samples, or pairs.
        bf16: forward under bfloat16 autocast.
        checkpointing: of every block only its inputs are held, and of one block at a time what is inside. At the end of
            forward autocast still holds its copies of all the blocks' weights.
    """
    network = trainee.get_submodule("network")
    assert isinstance(network, MMDiT)
    network.checkpoint_activations = False
    blocks = [*network.joint_blocks, *network.fused_blocks]
    # Real inputs are allowed for the one thing that is not a parameter: the whitening of tiny's latents.
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = {name: _fake_like(tensor) for name, tensor in trainee.named_parameters()}
        tensors |= {name: _fake_like(tensor) for name, tensor in trainee.named_buffers()}
        inputs = _fake_batch(size, batch)
        held = _Held(tensors.values(), inputs.values())
        with (
            held.watching(blocks),
            saved_tensors_hooks(held.save, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            torch.func.functional_call(trainee.train(), tensors, (inputs, lambda tensor: tensor))
    trained = [_trained(block) for block in blocks]
    every = _trained(trainee)
    graded = [sum(trained[place:]) for place in range(len(blocks))]
    before, after, inside = held.before.bytes, held.after.bytes, [part.bytes for part in held.inside]
    if not checkpointing:
        standing = [before + sum(inside[: place + 1]) for place in range(len(blocks))]
        whole = standing[-1] + after
    else:
        inputs_held = [before + sum(part.bytes for part in held.entering[: place + 1]) for place in range(len(blocks))]
        standing = [kept + here for kept, here in zip(inputs_held, inside, strict=True)]
        whole = inputs_held[-1] + after + (BFLOAT16 * sum(trained) if bf16 else 0)
    if isinstance(trainee, PreferenceTrainee):
        # The reference runs while the policy's activations are held, and has one block's own at a time.
        whole += max(inside)
    return [Moment(whole, 0), *map(Moment, standing, graded), Moment(before, every)]


class _Part:
    """Storages that one part of a forward was the first to save."""

    def __init__(self) -> None:
        # The storages are kept, so that no other takes their key.
        self.storages: dict[int, torch.UntypedStorage] = {}

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


class _Held:
    """What autograd saves in one forward, by storage and by part: before the blocks, in each of them, after them.

    Backward goes the other way, so a storage goes with the first part that saved it.
    """

    def __init__(self, resident: Iterable[Tensor], inputs: Iterable[Tensor]) -> None:
        self.before, self.after = _Part(), _Part()
        self.inside: list[_Part] = []
        self.entering: list[_Part] = []
        """What each block is given and nothing before it saved: all that checkpointing leaves of it."""
        self._resident = {_key(tensor) for tensor in resident}
        self._saved, self._entered = set(self._resident), set(self._resident)
        self._current = self.before
        for tensor in inputs:
            self.save(tensor)

    def save(self, tensor: Tensor) -> Tensor:
        """Note a tensor that is saved for backward."""
        self._note(tensor, self._current, self._saved)
        return tensor

    def _note(self, tensor: Tensor, part: _Part, known: set[int]) -> None:
        if _key(tensor) not in known:
            known.add(_key(tensor))
            part.storages[_key(tensor)] = tensor.untyped_storage()

    @contextmanager
    def watching(self, blocks: Iterable[nn.Module]) -> Iterator[None]:
        """Inside, what these modules are given and what they save is told apart from the rest."""
        hooks = []
        for block in blocks:
            hooks.append(block.register_forward_pre_hook(self._enter))
            hooks.append(block.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, block: nn.Module, inputs: tuple[object, ...]) -> None:
        if not torch.is_grad_enabled():
            return  # The same network once more, as its own reference.
        if not self.inside:
            self._entered |= self._saved
        self.entering.append(_Part())
        self.inside.append(_Part())
        for tensor in _tensors(inputs):
            self._note(tensor, self.entering[-1], self._entered)
        self._current = self.inside[-1]

    def _leave(self, block: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        self._current = self.after


def _trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _buffer_bytes(trained: int, stage: int, bf16: bool) -> int:
    """What DeepSpeed needs to reduce gradients, at its highest.

    Stage 0 copies all gradients into one flat buffer. From stage 1 on it fills buckets of the engine's size, and beside
    them lie the gradients on their way in and out; how much that is in buckets was measured, and under autocast there
    are buckets of both dtypes.
    """
    if stage == 0:
        return FLOAT32 * min(trained, FLAT_ELEMENTS)
    bucket = FLOAT32 * min(trained, MAX_BUCKET_ELEMENTS)
    buckets = 2.75 if stage == 3 else 2.25 if bf16 else 1.5
    return round(buckets * bucket)


def _trainee_without_memory(size: str, reference: bool, lora_rank: int | None) -> Trainee:
    """The loss of a training on a network of the meta device."""
    with torch.device("meta"):
        network = MMDiT(SIZES[size])
    if lora_rank is not None:
        add_adapters(network, lora_rank, float(lora_rank), seed=0)
    stored, model = SPECS[SPEC_OF_SIZE[size]].latent_dim, SIZES[size].latent_dim
    transform = ChannelTransform(network) if stored == model else Whitening(stored, model)
    policy = Policy(network, transform, size)
    # Without a copy of its own as reference: that one saves nothing for backward, and its weights are arithmetic.
    return (
        PreferenceTrainee(policy, None, PreferenceLossConfig(kappa=1.0), None)
        if reference
        else FlowMatchingTrainee(policy)
    )


def _fake_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", requires_grad=tensor.requires_grad)


def _fake_batch(size: str, batch: int) -> Batch:
    config, spec = SIZES[size], SPECS[SPEC_OF_SIZE[size]]
    sound = (batch, spec.latent_len, spec.latent_dim)
    shapes = {
        "clip_features": (batch, config.clip_len, config.clip_dim),
        "sync_features": (batch, config.sync_len, config.sync_dim),
        "text_features": (batch, config.text_len, config.text_dim),
        "noise": (batch, config.latent_len, config.latent_dim),
        "time": (batch,),
        **dict.fromkeys(("latent", "winner", "loser"), sound),
    }
    drops = {name: torch.empty(batch, dtype=torch.bool) for name in ("drop_video", "drop_text")}
    return {name: torch.empty(shape) for name, shape in shapes.items()} | drops
