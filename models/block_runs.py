"""How a network's blocks are called: plainly, compiled while that works, or computed again in backward.

A compiler that fails must not cost a run its start: the block and those after it then run as they are, which one
warning says. Blocks are compiled in place, so that names of weights, hooks and copies of a network stay as they were.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

REASON_LENGTH = 200
"""Characters of a compiler's message that the warning quotes; the whole is often a page."""


def compile_each(blocks: Sequence[nn.Module], backend: str | Callable[..., object]) -> None:
    """Let `torch.compile` compile every block at its first call, and again for shapes it has not seen."""
    for block in blocks:
        block.compile(backend=backend)


def run_block(blocks: Sequence[nn.Module], index: int, *inputs: object, recompute: bool) -> Any:
    """Output of block `index` for `inputs`; `recompute` keeps these alone for backward and calls the block again there.

    A compiled block that raises is called once more as it is: a fault of the caller is raised then, and a fault of the
    compiler becomes a RuntimeWarning.
    """
    block = blocks[index]

    def call() -> Any:
        if recompute:
            # Nothing in a block is random, so there is no generator to put back.
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    try:
        return call()
    except Exception as error:
        if block._compiled_call_impl is None:
            raise
        reason = " ".join(str(error).split())[:REASON_LENGTH] or type(error).__name__
    # Not those before it: their compiled results may wait for a backward, which has to find the same operations.
    for left in blocks[index:]:
        left._compiled_call_impl = None
    output = call()
    warnings.warn(f"blocks run uncompiled, torch.compile failed: {reason}", RuntimeWarning, stacklevel=2)
    return output
