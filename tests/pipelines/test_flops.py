"""Operations are those of the matrices, counted without computing anything; known GPUs are known by their names."""

import pytest
import torch
from torch import Tensor, nn

from models.mmdit import SIZES, MMDiT
from pipelines.training.activations import fake_batch, trainee_without_memory
from pipelines.training.flops import count_flops
from pipelines.training.gpus import GPUS, GpuName, peak_flops
from pipelines.training.objective import Batch, Gather, Trainee


class TwoLayers(Trainee):
    def __init__(self, *, looks: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 160))
        self.looks = looks

    def forward(self, batch: Batch, gather: Gather) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.net(batch["x"]).square().mean()
        return (loss * 2 if self.looks and float(loss.detach()) > 1 else loss), {}


def test_two_layers_have_three_products_each_but_for_the_inputs_gradient() -> None:
    counted = count_flops(TwoLayers(), {"x": torch.zeros(5, 64)})
    # Forward, the weights' gradients, and the gradient of what lies between; two operations a multiply-add.
    assert counted == 2 * 5 * (2 * 64 * 12 + 3 * 12 * 160)


def test_a_loss_that_looks_at_values_is_not_counted() -> None:
    assert count_flops(TwoLayers(looks=True), {"x": torch.zeros(5, 64)}) is None


def test_counting_leaves_weights_and_gradients_alone() -> None:
    trainee = TwoLayers()
    before = [parameter.detach().clone() for parameter in trainee.parameters()]
    count_flops(trainee, {"x": torch.ones(2, 64)})
    assert all((a == b).all() for a, b in zip(before, trainee.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in trainee.parameters())


def test_a_policys_operations_grow_with_the_batch_and_not_with_checkpointing() -> None:
    trainee = trainee_without_memory("tiny", reference=False, lora_rank=None)
    one, two = (count_flops(trainee, fake_batch("tiny", batch)) for batch in (2, 4))
    assert one is not None
    assert two is not None
    assert two / one == pytest.approx(2, rel=0.02)
    network = trainee.get_submodule("network")
    assert isinstance(network, MMDiT)
    network.checkpoint_activations = True
    assert count_flops(trainee, fake_batch("tiny", 2)) == one
    assert network.checkpoint_activations


def test_a_big_policy_needs_at_least_six_operations_a_weight_and_token_of_its_latent() -> None:
    size = "small_16k"
    trainee = trainee_without_memory(size, reference=False, lora_rank=None)
    counted = count_flops(trainee, fake_batch(size, 1))
    fused = trainee.get_submodule("network").get_submodule("fused_blocks")
    # The fused blocks work on the latent alone; their modulation is a product of every token too.
    weights = sum(parameter.numel() for parameter in fused.parameters() if parameter.dim() > 1)
    assert counted is not None
    floor = 6 * weights * SIZES[size].latent_len
    assert floor < counted < 10 * floor


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100_40"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_a_gpu_is_known_by_the_name_that_cuda_gives_it(name: str, gpu: GpuName) -> None:
    assert peak_flops(name, bf16=True) == GPUS[gpu].bf16_tflops * 1e12
    assert peak_flops(name, bf16=False) == GPUS[gpu].fp32_tflops * 1e12


def test_an_unknown_gpu_has_no_peak() -> None:
    assert peak_flops("NVIDIA L40", bf16=True) is None
    assert peak_flops("Tesla K80", bf16=True) is None
