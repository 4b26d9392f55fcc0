"""What a run asks for that its machine does not have: said before the first step, in one line."""

import torch

from pipelines.errors import InputError
from pipelines.training.options import TrainingOptions


def check_machine(options: TrainingOptions, device: torch.device) -> None:
    """Check the options against the device of this rank.

    Raises:
        InputError: bfloat16 on a GPU without it, or offloading where there is no GPU to relieve.
    """
    if options.offload and device.type != "cuda":
        raise InputError(
            "--offload moves the optimizer from a GPU to the host, and this worker has no GPU: leave it out"
        )
    if options.bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise InputError(f"--bf16: {name} has no bfloat16 arithmetic; leave it out, or use a GPU from Ampere on")
