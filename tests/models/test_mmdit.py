import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.flow_matching import euler_sample, flow_matching_loss, interpolate
from models.layers import Modulation
from models.mmdit import SIZES, SPEC_OF_SIZE, MMDiT, MMDiTConfig
from models.rope import rotary_table
from models.spec import SPECS
from tests.models.mmdit_golden import (
    TINY_V1,
    fill_by_rule,
    golden_gradients,
    golden_network,
    golden_vectors,
    relative_error,
    seeded,
)

FORWARD_TOLERANCE = 5e-5  # 6e-6 with plain convolutions, 2e-5 with oneDNN's AVX2 ones: float32 accumulation order
SAMPLING_TOLERANCE = 1e-3
PUBLIC_SIZES = [name for name in SIZES if name != "tiny"]


@pytest.fixture(scope="module")
def network() -> MMDiT:
    torch.set_num_threads(1)
    return golden_network()


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return golden_vectors(Path(__file__).parents[1] / "fixtures")


def _features(golden: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return golden["in.clip_f"], golden["in.sync_f"], golden["in.text_f"]


# --- names, shapes, sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", PUBLIC_SIZES)
def test_a_named_size_has_exactly_the_public_names_and_shapes(size: str, fixtures: Path) -> None:
    public = json.loads(gzip.decompress((fixtures / "mmdit" / "public_sizes.json.gz").read_bytes()))[size]
    with torch.device("meta"):
        network = MMDiT(SIZES[size])
    assert {name: list(tensor.shape) for name, tensor in network.state_dict().items()} == public["shapes"]
    parameters = dict(network.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == public["parameters"]
    assert sum(p.numel() for p in parameters.values() if p.requires_grad) == public["trainable"]
    assert [name for name, p in parameters.items() if not p.requires_grad] == public["frozen"]


@pytest.mark.parametrize("size", SIZES)
def test_every_size_works_on_the_lengths_and_widths_of_its_clip_spec(size: str) -> None:
    config, spec = SIZES[size], SPECS[SPEC_OF_SIZE[size]]
    assert (config.latent_len, config.clip_len, config.sync_len) == (spec.latent_len, spec.clip_len, spec.sync_len)
    assert (config.clip_dim, config.sync_dim, config.text_dim) == (spec.clip_dim, spec.sync_dim, spec.text_dim)
    assert config.text_len == spec.text_len
    assert config.latent_dim == spec.latent_dim or size == "tiny"  # tiny sees whitened components


def test_a_config_refuses_blocks_and_lengths_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="fused_depth"):
        MMDiTConfig(**(vars(TINY_V1) | {"fused_depth": 5}))
    with pytest.raises(ValueError, match="multiple of 8"):
        MMDiTConfig(**(vars(TINY_V1) | {"sync_len": 41}))


# --- the golden vectors: outputs of the original networks on synthetic weights ---------------------------------------


@torch.no_grad()
def test_forward_agrees_with_the_original(network: MMDiT, golden: dict[str, Tensor]) -> None:
    flow = network(golden["in.latent"], *_features(golden), golden["in.t"])
    assert relative_error(flow, golden["out.flow"]) < FORWARD_TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["cond", "empty"])
def test_projected_conditions_agree_with_the_original(prefix: str, network: MMDiT, golden: dict[str, Tensor]) -> None:
    features = _features(golden) if prefix == "cond" else network.empty_features(2)
    conditions = network.preprocess_conditions(*features)
    for name, actual in (
        ("clip_f", conditions.clip),
        ("sync_f", conditions.sync),
        ("text_f", conditions.text),
        ("clip_f_c", conditions.clip_global),
        ("text_f_c", conditions.text_global),
    ):
        assert relative_error(actual, golden[f"{prefix}.{name}"]) < FORWARD_TOLERANCE, name


def _streams(block: int, out: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"joint{block}.{stream}": x for stream, x in zip(("latent", "clip", "text"), out, strict=True)}


@torch.no_grad()
def test_each_block_agrees_with_the_original(network: MMDiT, golden: dict[str, Tensor]) -> None:
    seen: dict[str, Tensor] = {}
    hooks = []
    for i, block in enumerate(network.joint_blocks):
        hooks.append(block.register_forward_hook(lambda _m, _i, out, i=i: seen.update(_streams(i, out))))
    for i, block in enumerate(network.fused_blocks):
        hooks.append(block.register_forward_hook(lambda _m, _i, out, i=i: seen.update({f"fused{i}.latent": out})))
    for name in ("t_embed", "audio_input_proj"):
        module = network.get_submodule(name)
        hooks.append(module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out})))
    network(golden["in.latent"], *_features(golden), golden["in.t"])
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2 * 3 + 3 + 2
    for name, actual in seen.items():
        assert relative_error(actual, golden[name]) < FORWARD_TOLERANCE, name


def test_rotary_tables_agree_with_the_original(golden: dict[str, Tensor]) -> None:
    for stream, length, scale in (("latent", 50, 1.0), ("clip", 13, 50 / 13)):
        cos, sin = rotary_table(length, TINY_V1.head_dim, scale, torch.device("cpu"))
        matrices = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
        torch.testing.assert_close(matrices[None], golden[f"rope.{stream}"], atol=1e-6, rtol=0)


@torch.no_grad()
def test_guided_velocity_agrees_with_the_original(network: MMDiT, golden: dict[str, Tensor]) -> None:
    conditions = network.preprocess_conditions(*_features(golden))
    empty = network.preprocess_conditions(*network.empty_features(2))
    flow = network.guided_velocity(golden["gen.x0"], torch.full((2,), 0.3), conditions, empty, 4.5)
    assert relative_error(flow, golden["gen.cfg_flow_at_t0.3"]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize(
    ("guidance", "negative", "expected"),
    [
        (4.5, False, "gen.x1_cfg4.5_25steps"),
        (4.5, True, "gen.x1_cfg4.5_25steps_negative"),
        (0.5, False, "gen.x1_nocfg_25steps"),
    ],
)
def test_twenty_five_euler_steps_agree_with_the_original(
    guidance: float, negative: bool, expected: str, network: MMDiT, golden: dict[str, Tensor]
) -> None:
    conditions = network.preprocess_conditions(*_features(golden))
    clip_f, sync_f, text_f = network.empty_features(2)
    empty = network.preprocess_conditions(clip_f, sync_f, golden["in.neg_text"] if negative else text_f)
    x1 = euler_sample(
        lambda x, t: network.guided_velocity(x, t, conditions, empty, guidance), golden["gen.x0"], num_steps=25
    )
    assert relative_error(x1, golden[expected]) < SAMPLING_TOLERANCE


@torch.no_grad()
def test_other_lengths_use_the_same_weights(golden: dict[str, Tensor]) -> None:
    network = golden_network()
    network.set_lengths(latent_len=37, clip_len=9, sync_len=24)
    flow = network(
        golden["alt.in.latent"], golden["alt.in.clip_f"], golden["alt.in.sync_f"], golden["in.text_f"], golden["in.t"]
    )
    assert relative_error(flow, golden["alt.out.flow"]) < FORWARD_TOLERANCE


def test_training_loss_and_every_gradient_agree_with_the_original(fixtures: Path, golden: dict[str, Tensor]) -> None:
    network, reference = golden_network(), golden_gradients(fixtures)
    x0, x1 = golden["train.x0"], golden["train.x1_normalized"]
    normalised = (golden["train.x1_raw"] - network.latent_mean) / network.latent_std
    assert relative_error(normalised, x1) < 1e-6
    xt = interpolate(x0, x1, golden["in.t"])
    assert relative_error(xt, golden["train.xt"]) < 1e-6
    losses = flow_matching_loss(network(xt, *_features(golden), golden["in.t"]), x0, x1)
    torch.testing.assert_close(losses, golden["train.loss_per_sample"], rtol=1e-5, atol=0)
    losses.mean().backward()

    assert losses.mean().item() == pytest.approx(reference["loss_mean"], rel=1e-5)
    gradients = {name: p.grad for name, p in network.named_parameters()}
    assert [name for name, grad in gradients.items() if grad is None] == reference["no_grad"]
    total = reference["total_grad_norm"]
    for name, expected in reference["grad_norm"].items():
        gradient = gradients[name]
        assert gradient is not None, name
        assert gradient.norm().item() == pytest.approx(expected, rel=1e-4, abs=1e-6 * total), name
    for name in ("audio_input_proj.0.weight", "joint_blocks.0.latent_block.attn.qkv.bias", "sync_pos_emb"):
        gradient = gradients[name]
        assert gradient is not None
        assert relative_error(gradient, golden[f"train.grad.{name}"]) < 1e-4, name


# --- behaviour ----------------------------------------------------------------------------------------------------


def _inputs(config: MMDiTConfig, batch: int) -> tuple[Tensor, ...]:
    return (
        seeded("latent", (batch, config.latent_len, config.latent_dim)),
        seeded("clip", (batch, config.clip_len, config.clip_dim)),
        seeded("sync", (batch, config.sync_len, config.sync_dim)),
        seeded("text", (batch, config.text_len, config.text_dim)),
        torch.linspace(0.1, 0.9, batch),
    )


def test_a_fresh_network_is_the_zero_field_and_its_weights_repeat_from_a_seed() -> None:
    network, twin = MMDiT(SIZES["tiny"]), MMDiT(SIZES["tiny"])
    assert torch.count_nonzero(network(*_inputs(SIZES["tiny"], 2))) == 0
    for built in (network, twin):
        built.init_weights(torch.Generator().manual_seed(7))
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(network.state_dict().values(), twin.state_dict().values(), strict=True)
    )
    assert torch.isnan(network.latent_mean).all()
    weight = network.get_parameter("clip_cond_proj.weight")
    xavier_bound = (6 / (2 * SIZES["tiny"].hidden_dim)) ** 0.5
    assert weight.abs().max().item() == pytest.approx(xavier_bound, rel=0.01)


def test_v2_differs_from_v1_in_activations_names_and_time_features() -> None:
    v1, v2 = golden_network(), MMDiT(MMDiTConfig(**(vars(TINY_V1) | {"v2": True})))
    fill_by_rule(v2)
    assert "clip_input_proj.1.w1.weight" in v1.state_dict()
    assert "clip_input_proj.2.w1.weight" in v2.state_dict()
    assert v2.get_parameter("t_embed.mlp.0.weight").shape == (128, 128)
    inputs = _inputs(TINY_V1, 2)
    flow = v2(*inputs)
    assert torch.isfinite(flow).all()
    # v2 sees times on a scale of 1e-4, v1 does not
    latent, clip_f, sync_f, text_f, t = inputs
    moved = v2(latent, clip_f, sync_f, text_f, t + 3e-4)
    assert relative_error(moved, flow) > 1e-2
    v1_flow = v1(*inputs)
    assert relative_error(v1(latent, clip_f, sync_f, text_f, t + 3e-4), v1_flow) < 1e-2


@torch.no_grad()
def test_samples_of_a_batch_do_not_see_each_other(network: MMDiT, golden: dict[str, Tensor]) -> None:
    inputs = (golden["in.latent"], *_features(golden), golden["in.t"])
    whole = network(*inputs)
    for i in range(2):
        alone = network(*(tensor[i : i + 1] for tensor in inputs))
        assert relative_error(alone, whole[i : i + 1]) < FORWARD_TOLERANCE


@torch.no_grad()
def test_guidance_up_to_one_is_the_conditional_field_alone(network: MMDiT, golden: dict[str, Tensor]) -> None:
    conditions = network.preprocess_conditions(*_features(golden))
    empty = network.preprocess_conditions(*network.empty_features(2))
    conditional = network.predict(golden["in.latent"], golden["in.t"], conditions)
    for guidance in (0.0, 0.5, 1.0):
        flow = network.guided_velocity(golden["in.latent"], golden["in.t"], conditions, empty, guidance)
        assert torch.equal(flow, conditional)


@torch.no_grad()
def test_conditions_of_one_clip_serve_many_candidates(network: MMDiT, golden: dict[str, Tensor]) -> None:
    one = network.preprocess_conditions(*(feature[:1] for feature in _features(golden)))
    flow = network.predict(golden["in.latent"], golden["in.t"], one.expand(2))
    repeated = [feature[:1].repeat(2, 1, 1) for feature in _features(golden)]
    assert relative_error(flow, network(golden["in.latent"], *repeated, golden["in.t"])) < FORWARD_TOLERANCE


def test_dropped_conditions_become_the_nulls_sample_by_sample_and_train_them() -> None:
    network = golden_network()
    _, *features, _ = _inputs(TINY_V1, 4)
    drop_video, drop_text = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    replaced = network.replace_with_empty((features[0], features[1], features[2]), drop_video, drop_text)
    for feature, new, empty, drop in zip(
        features, replaced, network.empty_features(4), (drop_video, drop_video, drop_text), strict=True
    ):
        for i in range(4):
            assert torch.equal(new[i], empty[i] if drop[i] else feature[i])
    (replaced[0].sum() + replaced[1].sum()).backward()
    for name, tokens in (("empty_clip_feat", 2 * 13), ("empty_sync_feat", 2 * 40)):
        gradient = network.get_parameter(name).grad
        assert gradient is not None
        assert gradient.flatten().tolist() == [float(tokens)] * gradient.numel()
    assert network.get_parameter("empty_string_feat").grad is None


def test_nulls_get_a_zero_gradient_when_nothing_is_dropped() -> None:
    network = golden_network()
    latent, clip_f, sync_f, text_f, t = _inputs(TINY_V1, 2)
    keep = torch.zeros(2, dtype=torch.bool)
    network(latent, *network.replace_with_empty((clip_f, sync_f, text_f), keep, keep), t).sum().backward()
    missing = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


@torch.no_grad()
def test_consecutive_samples_share_a_condition_and_get_what_each_would_get_with_its_own(
    network: MMDiT, golden: dict[str, Tensor]
) -> None:
    conditions = network.preprocess_conditions(*_features(golden))
    latents, t = seeded("six", (6, 50, 20)), golden["in.t"]
    seen: list[torch.Size] = []
    modulations = [module for module in network.modules() if isinstance(module, Modulation)]
    hooks = [m.register_forward_hook(lambda _m, inputs, _out: seen.append(inputs[0].shape)) for m in modulations]
    shared = network.predict(latents, t, conditions)
    for hook in hooks:
        hook.remove()
    assert {shape[0] for shape in seen} == {2}, "a modulation was computed for every sample"
    repeated = [feature.repeat_interleave(3, dim=0) for feature in _features(golden)]
    assert relative_error(shared, network(latents, *repeated, t.repeat_interleave(3))) < FORWARD_TOLERANCE
    with pytest.raises(AssertionError, match="5 latents cannot share 2 conditions"):
        network.predict(latents[:5], t, conditions)


@torch.no_grad()
@pytest.mark.parametrize("num_empty", [1, 2])
def test_both_fields_of_guidance_are_one_forward_that_embeds_the_latents_once(
    num_empty: int, network: MMDiT, golden: dict[str, Tensor]
) -> None:
    conditions = network.preprocess_conditions(*_features(golden))
    empty = network.preprocess_conditions(*network.empty_features(num_empty))
    latents, t = seeded("four", (4, 50, 20)), golden["in.t"]
    batches: dict[str, list[int]] = {"audio_input_proj": [], "fused_blocks.0": []}
    hooks = [
        network.get_submodule(name).register_forward_hook(
            lambda _m, inputs, _out, name=name: batches[name].append(len(inputs[0]))
        )
        for name in batches
    ]
    flow = network.guided_velocity(latents, t, conditions, empty, 4.5)
    for hook in hooks:
        hook.remove()
    assert batches == {"audio_input_proj": [4], "fused_blocks.0": [8]}
    apart = [network.predict(latents, t, field) for field in (conditions, empty.expand(2))]
    assert relative_error(flow, 4.5 * apart[0] - 3.5 * apart[1]) < 1e-4


@torch.no_grad()
def test_bf16_networks_and_autocast_stay_close_to_float32(network: MMDiT, golden: dict[str, Tensor]) -> None:
    inputs = (golden["in.latent"], *_features(golden), golden["in.t"])
    halved = golden_network().to(torch.bfloat16)
    flow = halved(*inputs)
    assert flow.dtype == torch.bfloat16
    assert (flow.float() - golden["out.flow"]).square().mean().sqrt() < 0.03 * golden["out.flow"].std()
    with torch.autocast("cpu", torch.bfloat16):
        flow = network(*inputs)
    assert (flow.float() - golden["out.flow"]).square().mean().sqrt() < 0.03 * golden["out.flow"].std()


def test_lengths_that_cannot_be_are_refused(network: MMDiT) -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        network.set_lengths(latent_len=10, clip_len=3, sync_len=12)
    with pytest.raises(ValueError, match="positive"):
        network.set_lengths(latent_len=0, clip_len=3, sync_len=8)


@pytest.mark.gpu
@torch.no_grad()
def test_cuda_agrees_with_the_original_in_float32_and_bf16(golden: dict[str, Tensor]) -> None:
    network = golden_network().cuda()
    inputs = [tensor.cuda() for tensor in (golden["in.latent"], *_features(golden), golden["in.t"])]
    assert relative_error(network(*inputs).cpu(), golden["out.flow"]) < 1e-4
    flow = network.to(torch.bfloat16)(*inputs).float().cpu()
    assert (flow - golden["out.flow"]).square().mean().sqrt() < 0.03 * golden["out.flow"].std()
