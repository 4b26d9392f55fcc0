"""What a training holds for its backward pass, counted without memory: one forward of the real loss on fake tensors.

Fake tensors have shapes and dtypes and no contents, so that any size and batch is counted in seconds on any machine, by
the very code that will run: autograd tells what it saves. Under bfloat16 autocast that includes the cast copies of the
weights, which no batch size makes smaller.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from models.lora import add_adapters
from models.mmdit import SIZES, SPEC_OF_SIZE, MMDiT
from models.policy import Policy, empty_transform
from models.preference import PreferenceLossConfig
from models.spec import SPECS
from pipelines.training.flow_matching_objective import FlowMatchingTrainee
from pipelines.training.objective import Batch, Trainee
from pipelines.training.preference_objective import PreferenceTrainee

CAST_BYTES = 2
"""Of a weight's bfloat16 copy."""


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
        inputs = fake_batch(size, batch)
        held = _Held(tensors.values(), inputs.values())
        with (
            held.watching(blocks),
            saved_tensors_hooks(held.save, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            torch.func.functional_call(trainee.train(), tensors, (inputs, lambda tensor: tensor))
    trained = [num_trained(block) for block in blocks]
    every = num_trained(trainee)
    graded = [sum(trained[place:]) for place in range(len(blocks))]
    before, after, inside = held.before.bytes, held.after.bytes, [part.bytes for part in held.inside]
    if not checkpointing:
        standing = [before + sum(inside[: place + 1]) for place in range(len(blocks))]
        whole = standing[-1] + after
    else:
        inputs_held = [before + sum(part.bytes for part in held.entering[: place + 1]) for place in range(len(blocks))]
        standing = [kept + here for kept, here in zip(inputs_held, inside, strict=True)]
        whole = inputs_held[-1] + after + (CAST_BYTES * sum(trained) if bf16 else 0)
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


def num_trained(module: nn.Module) -> int:
    """Trainable parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def trainee_without_memory(size: str, *, reference: bool, lora_rank: int | None) -> Trainee:
    """The loss of a training, with its network on the meta device.

    Args:
        size: a name in `models.mmdit.SIZES`.
        reference: the loss of pairs (DPO-FM), else flow matching.
        lora_rank: adapters of this rank are trained; None: every weight.
    """
    with torch.device("meta"):
        network = MMDiT(SIZES[size])
    if lora_rank is not None:
        add_adapters(network, lora_rank, float(lora_rank), seed=0)
    policy = Policy(network, empty_transform(size, network), size)
    # Without a copy of its own as reference: that one saves nothing for backward, and its weights are arithmetic.
    return (
        PreferenceTrainee(policy, None, PreferenceLossConfig(kappa=1.0), None)
        if reference
        else FlowMatchingTrainee(policy)
    )


def _fake_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", requires_grad=tensor.requires_grad)


def fake_batch(size: str, batch: int) -> Batch:
    """Tensors of a batch of either loss as `collate` makes them, contents undefined."""
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
