"""What tensors on the CPU really take: the bytes of those that live, and their highest since a start."""

import gc
import weakref
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Allocations(TorchDispatchMode):
    """Bytes of all living CPU tensors: at the start, and at their highest since."""

    def __init__(self) -> None:
        super().__init__()
        gc.collect()
        self._known: dict[int, weakref.ref[UntypedStorage]] = {}
        self.live = 0
        # Not every object's attributes: some are made to warn.
        for found in [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]:
            for tensor in (found, found.grad if found.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu":
                    self._see(tensor)
        self.start = self.peak = self.live

    def restart_peak(self) -> None:
        """Count the highest from now on."""
        self.peak = self.live

    def _see(self, tensor: Tensor) -> None:
        if tensor.layout != torch.strided:
            # Others have no storage of their own; some test before may have left one.
            return
        storage = tensor.untyped_storage()
        known = self._known.get(storage._cdata)
        if known is None or known() is not storage:
            self._known[storage._cdata] = weakref.ref(storage)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self._see(tensor)
        self.peak = max(self.peak, self.live)
        return result
