"""Where a process computes."""

import torch


def cpu_device() -> torch.device:
    """The CPU with one torch thread.

    One, because the order of a sum must not depend on how many cores a machine has.
    """
    torch.set_num_threads(1)
    return torch.device("cpu")


def own_device() -> torch.device:
    """The first GPU that this process sees, else the CPU; for a process that shares its GPUs with nobody."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else cpu_device()
