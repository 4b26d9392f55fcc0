"""What common GPUs can do at most, from their makers' data sheets: for MFU and for a dry run's hours."""

from dataclasses import dataclass
from typing import Literal

GpuName = Literal["a100", "a100_40", "h100", "h100_pcie", "h200", "l4", "l40s", "rtx4090"]


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Dense peaks (no structured sparsity) and memory of one model of GPU."""

    device_names: tuple[str, ...]
    """Parts of the name that CUDA gives the device; all of them are in it."""
    bf16_tflops: float
    """Tensor cores, bfloat16 in, float32 sums."""
    fp32_tflops: float
    """Without tensor cores: torch's default for float32 (TF32 is off)."""
    memory_gib: float


GPUS: dict[GpuName, Gpu] = {
    "a100": Gpu(device_names=("A100", "80GB"), bf16_tflops=312, fp32_tflops=19.5, memory_gib=80),
    "a100_40": Gpu(device_names=("A100", "40GB"), bf16_tflops=312, fp32_tflops=19.5, memory_gib=40),
    "h100_pcie": Gpu(device_names=("H100 PCIe",), bf16_tflops=756, fp32_tflops=51, memory_gib=80),
    "h100": Gpu(device_names=("H100 80GB HBM3",), bf16_tflops=989, fp32_tflops=67, memory_gib=80),
    "h200": Gpu(device_names=("H200",), bf16_tflops=989, fp32_tflops=67, memory_gib=141),
    "l4": Gpu(device_names=("NVIDIA L4",), bf16_tflops=121, fp32_tflops=30.3, memory_gib=24),
    "l40s": Gpu(device_names=("L40S",), bf16_tflops=362, fp32_tflops=91.6, memory_gib=48),
    "rtx4090": Gpu(device_names=("RTX 4090",), bf16_tflops=165, fp32_tflops=82.6, memory_gib=24),
}


def peak_flops(device_name: str, *, bf16: bool) -> float | None:
    """Most operations a second of a device by the name that CUDA gives it; None where it is not in the table."""
    # "NVIDIA L4" is also how an L40S starts: names are compared word by word.
    words = f" {device_name} "
    for gpu in GPUS.values():
        if all(f" {part} " in words or f"-{part} " in words or f" {part}-" in words for part in gpu.device_names):
            return 1e12 * (gpu.bf16_tflops if bf16 else gpu.fp32_tflops)
    return None
