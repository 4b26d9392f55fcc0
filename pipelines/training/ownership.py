"""Which slices of which parameters this rank holds under each ZeRO stage, as live views of DeepSpeed's own tensors.

DeepSpeed 0.19.8 has two layouts. Stages 1 and 2: a parameter group is one flat vector, cut into equal parts whatever
lies at the cut; `_hp_mapping` says where a parameter meets this rank's part. Stage 3: each parameter is cut into equal
parts, the last one padded. At stage 0 every rank holds everything.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.training.fragments import MOMENTS, STEP, WEIGHT, Fragments, Slice


@dataclass(frozen=True)
class _Held:
    name: str
    start: int
    """First element of the parameter that is here."""
    length: int
    master: Tensor
    """What the optimizer steps: the parameter at stage 0, a flat vector from stage 1 on; key of its state."""
    offset: int
    """Where in the master the slice begins."""

    def of(self, tensor: Tensor) -> Tensor:
        """Return the slice [length] of the master or of a moment of its shape; a view where those are flat."""
        return tensor.detach().reshape(-1)[self.offset : self.offset + self.length]

    def fill(self, tensor: Tensor, values: Tensor) -> None:
        """Copy values [length] into the master or a moment, whatever its strides."""
        target = tensor.detach()
        if target.dim() == 1:
            target[self.offset : self.offset + self.length].copy_(values)
        else:
            # Stage 0: the whole parameter, which may be channels-last.
            target.copy_(values.view(target.shape))


class Ownership:
    """The slices of one rank; made after DeepSpeed's initialization."""

    def __init__(
        self, engine: Any, parameters: dict[str, nn.Parameter], stage: int, rank: int, world_size: int
    ) -> None:
        self._optimizer = engine.optimizer
        self._stage, self._rank, self._world_size = stage, rank, world_size
        held: dict[int, Callable[[dict[str, nn.Parameter]], Iterator[_Held]]] = {0: self._whole, 3: self._parts}
        self._held = list(held.get(stage, self._cuts)(parameters))

    def owned(self) -> list[Slice]:
        """Return what this rank has to write; over all ranks each element is there exactly once."""
        held = self._held[self._rank :: self._world_size] if self._stage == 0 else self._held
        return [self._slice(entry) for entry in held]

    def load(self, fragments: Fragments) -> None:
        """Fill this rank's slices, and let DeepSpeed make the weights of the forward pass from them."""
        if self._stage == 3:
            self._optimizer.checkpoint_event_prologue()
        for entry in self._held:
            entry.fill(entry.master, fragments.read(entry.name, WEIGHT, entry.start, entry.length))
            if not fragments.has_moments(entry.name):
                continue
            state = self._state(entry.master)
            state[STEP].fill_(max(float(state[STEP]), fragments.step(entry.name)))
            for moment in MOMENTS:
                entry.fill(state[moment], fragments.read(entry.name, moment, entry.start, entry.length))
        if self._stage in (1, 2):
            self._optimizer.update_lp_params()
        elif self._stage == 3:
            self._refresh_parts()
            self._optimizer.checkpoint_event_epilogue()

    def _slice(self, entry: _Held) -> Slice:
        values = {WEIGHT: entry.of(entry.master)}
        state = self._torch_optimizer().state.get(entry.master)
        if state:
            values |= {moment: entry.of(state[moment]) for moment in MOMENTS}
            values[STEP] = state[STEP]
        return Slice(entry.name, entry.start, values)

    def _state(self, master: Tensor) -> dict[str, Tensor]:
        """Return AdamW's state of a master, made as AdamW does at its first step where there is none."""
        state = self._torch_optimizer().state[master]
        if not state:
            state[STEP] = torch.zeros((), dtype=torch.float32, device=master.device)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(master, memory_format=torch.preserve_format)
        return state

    def _torch_optimizer(self) -> Any:
        return self._optimizer if self._stage == 0 else self._optimizer.optimizer

    def _whole(self, parameters: dict[str, nn.Parameter]) -> Iterator[_Held]:
        for name, parameter in parameters.items():
            yield _Held(name, 0, parameter.numel(), parameter, 0)

    def _cuts(self, parameters: dict[str, nn.Parameter]) -> Iterator[_Held]:
        for name, parameter in parameters.items():
            untyped: Any = parameter
            mapping = untyped._hp_mapping
            if mapping is None:
                continue
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            master = self._optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            yield _Held(name, here.start, here.numel, master, there.start)

    def _parts(self, parameters: dict[str, nn.Parameter]) -> Iterator[_Held]:
        for name, parameter in parameters.items():
            untyped: Any = parameter
            group, offset, padded = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
            start = self._rank * padded
            length = min(padded, untyped.ds_numel - start)
            if length > 0:
                yield _Held(name, start, length, self._optimizer.fp32_partitioned_groups_flat[group], offset)

    def _refresh_parts(self) -> None:
        """Do what DeepSpeed does when it has loaded float32 partitions of its own (`_rigid_load_state_dict`)."""
        optimizer = self._optimizer
        for group, master in enumerate(optimizer.fp32_partitioned_groups_flat):
            optimizer.fp16_partitioned_groups_flat[group].data.copy_(master.data)
            parts = optimizer.fp16_partitioned_groups[group]
            fresh = optimizer.unflatten(optimizer.fp16_partitioned_groups_flat[group], parts)
            for part, values in zip(parts, fresh, strict=True):
                part.data = values.data
