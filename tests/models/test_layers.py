import math

import pytest
import torch
import torch.nn.functional as F

from models.layers import (
    ChannelLastConv1d,
    GatedMLP,
    HeadRMSNorm,
    Modulation,
    TimeEmbedding,
    gated_hidden_dim,
    layer_norm,
    modulate,
    nearest_exact_upsample,
)
from models.rope import apply_rotary, rotary_table

CPU = torch.device("cpu")


@pytest.mark.parametrize(("dim", "ratio", "hidden"), [(448, 4, 1280), (896, 4, 2560), (128, 4, 512), (128, 3, 256)])
def test_hidden_width_is_two_thirds_of_the_ratio_rounded_up_to_256(dim: int, ratio: int, hidden: int) -> None:
    assert gated_hidden_dim(dim, ratio) == hidden


def test_a_channel_last_convolution_looks_at_neighbouring_tokens_and_pads_with_zeros() -> None:
    conv = ChannelLastConv1d(1, 1, 3, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[[1.0, 10.0, 100.0]]]))
    out = conv(torch.tensor([[[1.0], [2.0], [3.0]]]))
    assert out.flatten().tolist() == [210.0, 321.0, 32.0]


def test_a_gated_mlp_multiplies_a_silu_branch_with_a_linear_one() -> None:
    mlp = GatedMLP(2, 3)
    x = torch.randn(1, 5, 2, generator=torch.Generator().manual_seed(0))
    w1, w2, w3 = (mlp.get_parameter(f"{name}.weight") for name in ("w1", "w2", "w3"))
    gate = x @ w1.T
    torch.testing.assert_close(mlp(x), (gate * torch.sigmoid(gate) * (x @ w3.T)) @ w2.T)


def test_qk_norm_uses_the_epsilon_of_float32_for_small_bf16_values_too() -> None:
    x = torch.randn(2, 3, 4, 32, generator=torch.Generator().manual_seed(0)) * 1e-2
    normed = HeadRMSNorm(32).to(torch.bfloat16)(x.to(torch.bfloat16))
    assert normed.dtype == torch.float32
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(2, 3, 4), rtol=0, atol=0.01)


def test_modulation_splits_the_condition_in_order_shift_first() -> None:
    modulation = Modulation(2, 2)
    with torch.no_grad():
        modulation[1].weight.zero_()
        modulation[1].bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    shift, scale = modulation.chunks(torch.zeros(1, 1, 2))
    assert shift.tolist() == [[[1.0, 2.0]]]
    assert scale.tolist() == [[[3.0, 4.0]]]
    assert modulate(torch.ones(1, 1, 2), shift, scale).tolist() == [[[5.0, 7.0]]]


def test_layer_norm_has_mean_zero_and_variance_one_over_channels() -> None:
    out = layer_norm(torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)) * 7 + 3)
    torch.testing.assert_close(out.mean(-1), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(-1, correction=0), torch.ones(2, 3), atol=1e-4, rtol=0)


def _sources(length: int, target: int) -> list[int]:
    return nearest_exact_upsample(torch.arange(length).reshape(1, length, 1), target).flatten().tolist()


def test_nearest_exact_rounds_its_scale_to_float32_like_the_public_weights() -> None:
    sources = _sources(192, 345)
    exact = [int((n + 0.5) * 192 / 345) for n in range(345)]
    assert (sources[57], sources[172], sources[287]) == (31, 95, 160)
    assert (exact[57], exact[172], exact[287]) == (32, 96, 160)
    assert [n for n in range(345) if sources[n] != exact[n]] == [57, 172]


@pytest.mark.parametrize(
    ("length", "target"), [(192, 345), (192, 250), (40, 50), (24, 37), (40, 40), (8, 3), (136, 251)]
)
def test_nearest_exact_agrees_with_torch_on_the_cpu(length: int, target: int) -> None:
    x = torch.arange(length, dtype=torch.float32).reshape(1, 1, length)
    assert _sources(length, target) == F.interpolate(x, size=target, mode="nearest-exact").flatten().int().tolist()


def test_v1_time_frequencies_fall_from_one_and_v2_frequencies_from_ten_thousand() -> None:
    v1 = TimeEmbedding(448, frequency_dim=256, max_period=10_000).frequencies()
    v2 = TimeEmbedding(448, frequency_dim=448, max_period=1).frequencies()
    exact_v1 = 10_000 ** (-torch.arange(0, 256, 2, dtype=torch.float64) / 256)
    exact_v2 = 10_000 * 10_000 ** (-torch.arange(0, 448, 2, dtype=torch.float64) / 448)
    torch.testing.assert_close(v1.double(), exact_v1, rtol=1e-6, atol=0)
    torch.testing.assert_close(v2.double(), exact_v2, rtol=1e-6, atol=0)


def test_v2_frequencies_are_rounded_power_then_reciprocal_then_factor() -> None:
    frequencies = TimeEmbedding(896, frequency_dim=896, max_period=1).frequencies()
    power = torch.tensor(10_000.0) ** (torch.arange(0, 896, 2) / 896)
    reciprocal = torch.ones(448) / power
    assert torch.equal(frequencies, reciprocal * 10_000)
    assert not torch.equal(frequencies, torch.full((448,), 10_000.0) / power)


@torch.no_grad()
def test_v2_time_features_are_those_of_the_rounding_order_and_of_no_other() -> None:
    embedding = TimeEmbedding(896, frequency_dim=896, max_period=1)
    seen: list[torch.Tensor] = []
    embedding.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
    t = torch.linspace(0.02, 1.0, 50)
    embedding(t)

    exponents = torch.arange(0, 896, 2, dtype=torch.float32) / 896
    power = torch.tensor(10_000.0) ** exponents
    right = t[:, None] * ((1.0 / power) * 10_000)
    others = {
        "one division": t[:, None] * (torch.tensor(10_000.0) / power),
        "one power": t[:, None] * torch.tensor(10_000.0) ** (1 - exponents),
        "an exponential": t[:, None] * torch.exp(math.log(10_000) * (1 - exponents)),
        "float64": t.double()[:, None] * 10_000.0 ** (1 - torch.arange(0, 896, 2, dtype=torch.float64) / 896),
        "the time first": (t[:, None] / power) * 10_000,
    }
    features = [
        torch.cat([angles.double().cos(), angles.double().sin()], dim=1) for angles in (right, *others.values())
    ]
    assert (seen[0] - features[0]).abs().max() < 1e-6
    for name, wrong in zip(others, features[1:], strict=True):
        assert (seen[0] - wrong).abs().max() > 2e-4, name


def test_a_bf16_time_embedding_keeps_float32_angles() -> None:
    embedding = TimeEmbedding(64, frequency_dim=64, max_period=1)
    t = torch.tensor([0.137, 0.842])
    expected = embedding(t)
    torch.testing.assert_close(embedding.to(torch.bfloat16)(t).float(), expected, atol=0.03, rtol=0.05)


def test_rotation_keeps_lengths_and_makes_products_depend_on_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 16, generator=generator).expand(2, 1, 1, 12, 16)
    table = rotary_table(12, 16, 1.0, CPU)
    rotated_query, rotated_key = apply_rotary(query, table), apply_rotary(key, table)
    torch.testing.assert_close(rotated_query.norm(dim=-1), query.norm(dim=-1))
    products = (rotated_query @ rotated_key.transpose(-1, -2))[0, 0]
    for distance in range(-5, 6):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    assert (products.diagonal(1)[0] - products.diagonal(4)[0]).abs() > 0.1


def test_rotation_pairs_neighbouring_channels() -> None:
    table = rotary_table(2, 4, 1.0, CPU)
    rotated = apply_rotary(torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, 1, 2, 4), table)[0, 0]
    torch.testing.assert_close(rotated[1, :2], torch.tensor([1.0, 1.0]).mul(torch.tensor([0.540302, 0.841471])))
    assert rotated[1, 2:].tolist() == [0.0, 0.0]


def test_a_stretched_stream_meets_the_other_at_the_same_time() -> None:
    latents, clip = rotary_table(250, 64, 1.0, CPU), rotary_table(64, 64, 250 / 64, CPU)
    torch.testing.assert_close(clip[:, 32], latents[:, 125], atol=1e-4, rtol=0)  # both are half of the clip
