"""Weights and optimizer state as named slices of parameters, in files that every number of workers can read.

A rank writes the slices that it owns under `<parameter>@<first element>@<what>`, and each file tells the shapes of all
parameters. A reader asks for slices by parameter and range and gets them put together from whatever pieces lie there,
so it matters neither how many ranks wrote them nor under which ZeRO stage. Elements are counted in row-major order.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipelines.errors import InputError

WEIGHT, STEP, BUFFER = "weight", "step", "buffer"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's two moments, under torch's own names."""
SEPARATOR = "@"
SHAPES = "shapes"


@dataclass(frozen=True)
class Slice:
    """Some elements of one parameter, in row-major order, and what the optimizer knows of them."""

    name: str
    start: int
    values: dict[str, Tensor]
    """`weight`, and once the optimizer has stepped `exp_avg` and `exp_avg_sq`, each float32 [n]; `step`, float32 []."""


@dataclass(frozen=True)
class HostCopy:
    """One rank's share of a checkpoint in host memory, nothing of which training changes any more."""

    tensors: dict[str, Tensor]
    shapes: dict[str, list[int]]

    def write(self, path: Path) -> None:
        """Write one safetensors file; raises OSError or SafetensorError."""
        save_file(self.tensors, path, metadata={SHAPES: json.dumps(self.shapes)})


def copy_to_host(slices: list[Slice], buffers: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> HostCopy:
    """Copy slices and whole buffers to host memory; returns when the copy is there."""
    tensors = {
        SEPARATOR.join((entry.name, str(entry.start), what)): value
        for entry in slices
        for what, value in entry.values.items()
    }
    tensors |= {SEPARATOR.join((name, "0", BUFFER)): value for name, value in buffers.items()}
    host = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
    return HostCopy(host, dict(shapes))


class Fragments:
    """The slices of one checkpoint, over all of its files."""

    def __init__(self, paths: list[Path], shapes: Mapping[str, list[int]], stack: ExitStack) -> None:
        """Look at what the files hold; they stay open until `stack` closes.

        Raises:
            InputError: there is none, or they are of a model with other parameters than `shapes`.
        """
        if not paths:
            raise InputError("the checkpoint holds no weights that this version can read: begin in a new --out")
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for path in paths:
            file: Any = stack.enter_context(safe_open(path, framework="pt"))
            _check_shapes(json.loads((file.metadata() or {}).get(SHAPES, "{}")), shapes, path)
            for key in file.keys():  # noqa: SIM118  (not a dict)
                name, start, what = key.rsplit(SEPARATOR, 2)
                shape = file.get_slice(key).get_shape()
                length = shape[0] if shape and what != BUFFER else 1
                self._pieces.setdefault((name, what), []).append((int(start), length, file, key))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[0])

    def has_moments(self, name: str) -> bool:
        """Whether the optimizer had stepped on this parameter."""
        return (name, MOMENTS[0]) in self._pieces

    def read(self, name: str, what: str, start: int, length: int) -> Tensor:
        """Return elements [start, start + length) of `weight` or a moment: float32 [length].

        Raises:
            InputError: some of them are in no file.
        """
        out = torch.empty(length)
        at = start
        for first, count, file, key in self._pieces.get((name, what), []):
            low, high = max(at, first), min(first + count, start + length)
            if low == at and low < high:
                out[low - start : high - start] = file.get_slice(key)[low - first : high - first]
                at = high
        if at != start + length:
            raise InputError(f"the checkpoint lacks elements {at} to {start + length} of {what} of {name}")
        return out

    def step(self, name: str) -> float:
        """Return how many steps the optimizer has made on this parameter."""
        _, _, file, key = self._pieces[name, STEP][0]
        return float(file.get_tensor(key))

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the buffers with their names."""
        for (name, what), pieces in self._pieces.items():
            if what == BUFFER:
                yield name, pieces[0][2].get_tensor(pieces[0][3])


def _check_shapes(found: Mapping[str, list[int]], expected: Mapping[str, list[int]], path: Path) -> None:
    if found == expected:
        return
    names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    first = names[0]
    raise InputError(
        f"{path} is a checkpoint of another model: {len(names)} parameters differ, first {first} "
        f"({found.get(first)} there, {expected.get(first)} here); continue with the same model or begin in a new --out"
    )
