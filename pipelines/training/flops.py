"""Floating-point operations of a training step, counted once on fake tensors: nothing is computed, nothing allocated.

Counted by torch.utils.flop_counter: matrix products, convolutions and attention, two operations a multiply-add, forward
and backward. What activation checkpointing computes again is not in it: these are the model's operations, which is what
MFU is made of (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.mmdit import MMDiT
from pipelines.training.batches import SAMPLE_ROWS, BatchSource, to_device
from pipelines.training.gpus import peak_flops
from pipelines.training.objective import Trainee
from pipelines.training.timing import DeviceLoad


def count_flops(trainee: Trainee, batch: Mapping[str, Tensor]) -> int | None:
    """Count the operations of forward and backward of one micro batch of a loss, in training mode.

    None where the loss looks at values, which fake tensors do not have.

    Args:
        trainee: the loss with its network, on any device, `meta` included; its weights are left as they are.
        batch: tensors of the shapes of a batch; only shapes, dtypes and devices are read.
    """
    with _computed_once(trainee), FakeTensorMode(allow_non_fake_inputs=True):
        tensors = {name: _fake_like(tensor) for name, tensor in trainee.named_parameters()}
        tensors |= {name: _fake_like(tensor) for name, tensor in trainee.named_buffers()}
        inputs = {name: _fake_like(tensor) for name, tensor in batch.items()}
        # The attention of matrix products, since torch counts the fused kernels of CUDA and not those of a CPU. No
        # compiled code: there is nothing to compile for.
        with (
            torch.compiler.set_stance("force_eager"),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            try:
                loss, _ = torch.func.functional_call(trainee.train(), tensors, (inputs, lambda tensor: tensor))
                loss.backward()
            except (DataDependentOutputException, DynamicOutputShapeException):
                return None
    return counter.get_total_flops()


def device_load(trainee: Trainee, source: BatchSource, device: torch.device, *, bf16: bool) -> DeviceLoad | None:
    """What a sample asks of a GPU; None on a CPU, on a GPU that is not known, and for a loss that looks at values."""
    peak = peak_flops(torch.cuda.get_device_name(device), bf16=bf16) if device.type == "cuda" else None
    if peak is None:
        return None
    counted = count_flops(trainee, to_device(source.sample(), device))
    return None if counted is None else DeviceLoad(sample_flops=counted // SAMPLE_ROWS, peak_flops=peak)


@contextmanager
def _computed_once(trainee: Trainee) -> Iterator[None]:
    """Inside, no block is computed again in backward."""
    networks = [module for module in trainee.modules() if isinstance(module, MMDiT) and module.checkpoint_activations]
    for network in networks:
        network.checkpoint_activations = False
    try:
        yield
    finally:
        for network in networks:
            network.checkpoint_activations = True


def _fake_like(tensor: Tensor) -> Tensor:
    """Where the trainee is on `meta`, the fakes are on the CPU, as are the losses' constants."""
    device = torch.device("cpu") if tensor.device.type == "meta" else tensor.device
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device, requires_grad=tensor.requires_grad)
