"""Low-rank adapters: the algebra, the untouched start, what is trained, the base underneath, and the merge."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.layers import ChannelLastConv1d
from models.lora import adapters, add_adapters, merged_state_dict, without_adapters
from models.mmdit import MMDiT
from models.policy import Policy
from models.weights import load_weights
from tests.models.mmdit_golden import fill_by_rule, golden_network

RANK, ALPHA = 3, 6.0


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def inputs(network: MMDiT, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    config = network.config
    shapes = (
        (config.latent_len, config.latent_dim),
        (config.clip_len, config.clip_dim),
        (config.sync_len, config.sync_dim),
        (config.text_len, config.text_dim),
    )
    latent, clip, sync, text = (torch.randn(batch, *shape, generator=generator) for shape in shapes)
    return latent, clip, sync, text, torch.rand(batch, generator=generator)


def adapted(*, trained: bool, seed: int = 0) -> MMDiT:
    network = golden_network()
    add_adapters(network, RANK, ALPHA, seed)
    if trained:
        pretend_training(network)
    return network


@torch.no_grad()
def pretend_training(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for adapter in adapters(network).values():
        adapter.up.weight.copy_(0.1 * torch.randn(adapter.up.weight.shape, generator=generator))


def rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def test_beside_a_linear_map_it_adds_alpha_over_r_times_b_a_x() -> None:
    network = nn.Sequential(nn.Linear(2, 2))
    add_adapters(network, rank=1, alpha=3.0, seed=0)
    adapter = adapters(network)["0"]
    with torch.no_grad():
        network.get_parameter("0.weight").copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        network.get_parameter("0.bias").copy_(torch.tensor([0.5, -0.5]))
        adapter.down.weight.copy_(torch.tensor([[1.0, 2.0]]))
        adapter.up.weight.copy_(torch.tensor([[10.0], [-1.0]]))
    # A x = 1 * 4 + 2 * 5 = 14; 3 / 1 * B A x = (420, -42); W x + b = (4.5, 4.5)
    assert network(torch.tensor([4.0, 5.0])).tolist() == [424.5, -37.5]


def test_beside_a_convolution_it_is_the_convolution_with_the_product_as_its_kernel() -> None:
    network = nn.Sequential(ChannelLastConv1d(4, 6, 3))
    base = network.get_parameter("0.weight").detach().clone()
    add_adapters(network, RANK, ALPHA, seed=0)
    pretend_training(network)
    adapter = adapters(network)["0"]
    product = torch.einsum("or,rik->oik", adapter.up.weight, adapter.down.weight)
    plain = ChannelLastConv1d(4, 6, 3)
    with torch.no_grad():
        plain.weight.copy_(base + ALPHA / RANK * product)
        plain.bias.copy_(network.get_parameter("0.bias"))  # pyright: ignore[reportOptionalMemberAccess]
    x = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(network(x), plain(x), rtol=1e-5, atol=1e-6)


def test_every_linear_map_and_convolution_has_one_and_nothing_else_is_trained() -> None:
    plain, network = golden_network(), adapted(trained=False)
    maps = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear | nn.Conv1d)}
    assert set(adapters(network)) == maps
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.adapter.{part}.weight" for name in maps for part in ("down", "up")}
    assert set(plain.state_dict()) == set(network.state_dict()) - trained


def test_a_fresh_adapter_changes_no_bit_of_the_velocity_nor_of_the_export() -> None:
    plain, network = golden_network(), golden_network()
    with torch.no_grad():
        # Adding a zero would turn it into +0.
        for one in (plain, network):
            one.joint_blocks.get_parameter("0.latent_block.attn.qkv.weight")[0, 0] = -0.0
    add_adapters(network, RANK, ALPHA, seed=0)
    with torch.no_grad():
        assert torch.equal(network(*inputs(network)), plain(*inputs(plain)))
    exported, expected = merged_state_dict(network), plain.state_dict()
    assert list(exported) == list(expected)
    assert all(same_bits(exported[name], expected[name]) for name in expected)


def test_the_merged_network_has_the_velocity_of_the_adapted_one_and_not_that_of_the_base() -> None:
    network, base = adapted(trained=True), golden_network()
    merged = MMDiT(network.config)
    merged.load_state_dict(merged_state_dict(network), strict=True)
    with torch.no_grad():
        wanted, got, start = (one(*inputs(one)) for one in (network, merged, base))
    assert rms(got - wanted) < 1e-5 * rms(wanted)
    assert rms(start - wanted) > 1e-2 * rms(wanted)


def test_the_start_is_kaiming_uniform_from_its_seed_and_draws_nothing_from_the_global_generator() -> None:
    network = nn.Sequential(nn.Linear(400, 300), nn.Linear(400, 300))
    state = torch.get_rng_state()
    add_adapters(network, rank=16, alpha=16.0, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    first, second = (adapters(network)[name].down.weight.detach() for name in ("0", "1"))
    # Uniform in +-1 / sqrt(400): variance bound^2 / 3.
    assert float(first.abs().max()) <= 400**-0.5
    assert float(first.var()) == pytest.approx(1 / 400 / 3, rel=0.05)
    assert not torch.equal(first, second)
    assert all(not bool(adapter.up.weight.any()) for adapter in adapters(network).values())


def test_equal_seeds_start_equal_adapters_and_other_seeds_others() -> None:
    starts = [adapters(adapted(trained=False, seed=seed))["final_layer.conv"].down.weight for seed in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_without_its_adapters_the_network_is_the_base_and_afterwards_adapted_again_even_after_an_error() -> None:
    network, base = adapted(trained=True), golden_network()
    with torch.no_grad():
        own = network(*inputs(network))
        with without_adapters(network):
            assert torch.equal(network(*inputs(network)), base(*inputs(base)))
        with pytest.raises(RuntimeError, match="inside"), without_adapters(network):
            raise RuntimeError("inside")
        assert torch.equal(network(*inputs(network)), own)


def test_every_adapter_gets_a_gradient_and_the_base_none() -> None:
    network = adapted(trained=True)
    network(*inputs(network)).square().mean().backward()
    for name, parameter in network.named_parameters():
        if ".adapter." in name:
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 0, name
        else:
            assert parameter.grad is None, name


def test_under_bfloat16_autocast_adapters_stay_float32_and_the_merge_is_near() -> None:
    network = adapted(trained=True)
    merged = MMDiT(network.config)
    merged.load_state_dict(merged_state_dict(network), strict=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted, got = network(*inputs(network)), merged(*inputs(merged))
    assert all(adapter.down.weight.dtype == torch.float32 for adapter in adapters(network).values())
    assert rms(got.float() - wanted.float()) < 0.05 * rms(wanted.float())


def test_a_policy_is_saved_merged_and_loads_strictly_as_a_plain_one(tmp_path: Path) -> None:
    policy = Policy.create("tiny", seed=0)
    fill_by_rule(policy.network)
    plain, fresh, trained = (tmp_path / name for name in ("plain", "fresh", "trained"))
    for folder in (plain, fresh, trained):
        folder.mkdir()
    policy.save(plain)
    add_adapters(policy.network, RANK, ALPHA, seed=0)
    policy.save(fresh)
    assert (fresh / "network.safetensors").read_bytes() == (plain / "network.safetensors").read_bytes()
    pretend_training(policy.network)
    policy.save(trained)
    loaded = Policy.load(trained)
    assert set(load_weights(trained / "network.safetensors")) == set(load_weights(plain / "network.safetensors"))
    assert adapters(loaded.network) == {}
    with torch.no_grad():
        wanted, got = policy.network(*inputs(policy.network)), loaded.network(*inputs(loaded.network))
    assert rms(got - wanted) < 1e-5 * rms(wanted)


def test_what_cannot_be_adapted_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        add_adapters(golden_network(), 0, 1.0, seed=0)
    with pytest.raises(ValueError, match="adapters already"):
        add_adapters(adapted(trained=False), RANK, ALPHA, seed=0)
    with pytest.raises(ValueError, match="float32"):
        add_adapters(golden_network().to(torch.bfloat16), RANK, ALPHA, seed=0)
