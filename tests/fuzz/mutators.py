"""Seeds -> mutants: each is made by its number alone, so that any of them can be made again by itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from tests.fuzz.containers import KINDS, Kind, body_offset, fields_of

Mutator = Callable[["Workshop", bytes], tuple[bytes, str]]
"""(workshop, content) -> (changed content, what was done)."""
UNTOUCHED_EVERY = 64
"""One in so many mutants is a seed as it is: what it becomes is known."""
MAX_MUTANT_BYTES = 1 << 20
NUM_STEPS = (1, 2, 3, 5)
STEPS_SHARES = (0.6, 0.22, 0.12, 0.06)


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One file of a fuzz run."""

    index: int
    seed_name: str
    """The seed it comes from; the head's, where it is of two."""
    steps: tuple[str, ...]
    """What was done to the seed; empty for an untouched one."""
    content: bytes

    @property
    def recipe(self) -> str:
        """One line for a person."""
        return (
            f"#{self.index} {self.seed_name}: {', then '.join(self.steps) or 'untouched'} ({len(self.content)} bytes)"
        )


class Workshop:
    """The seeds and the dice of one mutant."""

    def __init__(self, seeds: Mapping[str, bytes], rng: np.random.Generator) -> None:
        self.seeds = seeds
        self.rng = rng

    def below(self, limit: int) -> int:
        """A whole number in [0, max(limit, 1))."""
        return int(self.rng.integers(max(limit, 1)))

    def length(self, most: int) -> int:
        """A length in [1, most], short ones as likely as long ones."""
        return int(np.exp(self.rng.uniform(0, np.log(max(most, 1) + 0.99))))

    def other(self) -> tuple[str, bytes]:
        """Any seed."""
        name = sorted(self.seeds)[self.below(len(self.seeds))]
        return name, self.seeds[name]


def make_mutant(seeds: Mapping[str, bytes], run_seed: int, index: int) -> Mutant:
    """Mutant `index` of a run; the same arguments give the same bytes."""
    workshop = Workshop(seeds, np.random.default_rng([run_seed, index]))
    name, content = workshop.other()
    if index % UNTOUCHED_EVERY == 0:
        return Mutant(index=index, seed_name=name, steps=(), content=content)
    steps: list[str] = []
    for _ in range(int(workshop.rng.choice(NUM_STEPS, p=STEPS_SHARES))):
        chosen = list(MUTATORS)[workshop.below(len(MUTATORS))]
        content, what = MUTATORS[chosen](workshop, content)
        steps.append(what)
    return Mutant(index=index, seed_name=name, steps=tuple(steps), content=content[:MAX_MUTANT_BYTES])


def flip_bits(workshop: Workshop, content: bytes) -> tuple[bytes, str]:
    """Single bits anywhere."""
    count = workshop.length(64)
    changed = bytearray(content)
    for _ in range(count if content else 0):
        changed[workshop.below(len(content))] ^= 1 << workshop.below(8)
    return bytes(changed), f"{count} bits flipped"


def byte_run(workshop: Workshop, content: bytes) -> tuple[bytes, str]:
    """A stretch of zeros, ones or noise."""
    start, length = workshop.below(len(content)), workshop.length(4096)
    length = min(length, len(content) - start)
    fill = (bytes(length), b"\xff" * length, workshop.rng.bytes(length))[workshop.below(3)]
    return content[:start] + fill + content[start + length :], f"{length} bytes overwritten at {start}"


def truncate(workshop: Workshop, content: bytes) -> tuple[bytes, str]:
    """The end is missing; cuts near the ends are as likely as those in the middle."""
    keep = (
        workshop.length(len(content)),
        workshop.below(len(content) + 1),
        max(len(content) - workshop.length(len(content)), 0),
    )[workshop.below(3)]
    return content[:keep], f"cut to {keep} bytes"


def behead(workshop: Workshop, content: bytes) -> tuple[bytes, str]:
    """The start is missing."""
    lost = workshop.length(len(content))
    return content[lost:], f"the first {lost} bytes lost"


def splice_head(workshop: Workshop, content: bytes) -> tuple[bytes, str]:
    """The head of this file before the body of another."""
    name, other = workshop.other()
    if workshop.below(2):
        cut, other_cut = body_offset(content), body_offset(other)
    else:
        cut, other_cut = workshop.below(len(content)), workshop.below(len(other))
    return content[:cut] + other[other_cut:], f"{cut} bytes of head before {name} from {other_cut}"


def transplant(workshop: Workshop, content: bytes) -> tuple[bytes, str]:
    """A piece of another file inside this one, over it or between."""
    name, other = workshop.other()
    source, length = workshop.below(len(other)), workshop.length(8192)
    piece, at = other[source : source + length], workshop.below(len(content))
    over = len(piece) * workshop.below(2)
    return content[:at] + piece + content[at + over :], f"{len(piece)} bytes of {name} at {at}"


def rearrange(workshop: Workshop, content: bytes) -> tuple[bytes, str]:
    """A piece lost, doubled, or moved to the end."""
    start, length = workshop.below(len(content)), workshop.length(8192)
    piece, rest = content[start : start + length], content[start + length :]
    kind = workshop.below(3)
    changed = (content[:start] + rest, content[:start] + piece + piece + rest, content[:start] + rest + piece)[kind]
    return changed, f"{len(piece)} bytes at {start} {('lost', 'doubled', 'moved to the end')[kind]}"


def _alter(kind: Kind) -> Mutator:
    def alter(workshop: Workshop, content: bytes) -> tuple[bytes, str]:
        found = [field for field in fields_of(content) if field.kind == kind]
        if not found:
            return flip_bits(workshop, content)
        count = min(workshop.length(8), len(found)) if kind in ("time", "table", "config") else 1
        changed, done = bytearray(content), []
        for at in workshop.rng.choice(len(found), count, replace=False):
            field = found[int(at)]
            order = "little" if field.little else "big"
            place = slice(field.offset, field.offset + field.length)
            value = _value(workshop, int.from_bytes(content[place], order), field.length, kind)
            changed[place] = value.to_bytes(field.length, order)
            done.append(f"{field.offset}={value:#x}")
        return bytes(changed), f"{kind} at {' '.join(done)}"

    return alter


def _value(workshop: Workshop, old: int, length: int, kind: Kind) -> int:
    """A value that readers stumble over; names and set-ups are changed a little, so that they are still recognised."""
    top = 1 << 8 * length
    if kind in ("name", "config") and workshop.below(4):
        return old ^ 1 << workshop.below(8 * length)
    # An EBML size keeps its length marker most of the time.
    marked = 1 << 7 * length if kind == "size" and old & 1 << 7 * length else 0
    choices = (
        0,
        1,
        7,
        8,
        top - 1,
        top // 2,
        top // 2 - 1,
        old - 1,
        old + 1,
        old * 2,
        old // 2,
        old + 8,
        old ^ top >> 1,
    )
    pick = workshop.below(len(choices) + 4)
    if pick < len(choices):
        return (choices[pick] % top) | (marked if workshop.below(4) else 0)
    if pick == len(choices):
        return int.from_bytes(workshop.rng.bytes(length), "big")
    return (workshop.length(min(top - 1, 1 << 40)) % top) | marked


MUTATORS: dict[str, Mutator] = {
    "flip_bits": flip_bits,
    "byte_run": byte_run,
    "truncate": truncate,
    "behead": behead,
    "splice_head": splice_head,
    "transplant": transplant,
    "rearrange": rearrange,
    **{f"alter_{kind}": _alter(kind) for kind in KINDS},
}
