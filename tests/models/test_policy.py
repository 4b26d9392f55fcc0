import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.latent_transform import ChannelTransform, StreamingMoments, Whitening
from models.mmdit import SIZES
from models.policy import Policy
from models.spec import SPECS
from tests.models.mmdit_golden import fill_by_rule, golden_network, golden_vectors, relative_error

Batch = tuple[Tensor, Tensor, Tensor]


def _training_split(num_clips: int = 24) -> Batch:
    """Latents of 40 directions hidden in 160 channels of very different size and offset, and unlike features."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(40, 160, generator=generator) * torch.logspace(-2, 1, 160)
    strengths = torch.logspace(1, -2, 40)
    latents = (torch.randn(num_clips, 40, 40, generator=generator) * strengths) @ directions - 5
    clip_f = torch.rand(num_clips, 3, 192, generator=generator) + 2
    sync_f = torch.randn(num_clips, 40, 576, generator=generator) * torch.linspace(0.0, 0.2, 576)
    return latents, clip_f, sync_f


def _in_batches(split: Batch, size: int) -> list[Batch]:
    latents, clip_f, sync_f = (tensor.split(size) for tensor in split)
    return list(zip(latents, clip_f, sync_f, strict=True))


def _fitted(batch_size: int = 8) -> Policy:
    policy = Policy.create("tiny", seed=3)
    fill_by_rule(policy.network)  # a fresh network is the zero field; this one says something
    policy.fit_statistics(_in_batches(_training_split(), batch_size))
    return policy


def _features(batch: int, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    config = SIZES["tiny"]
    clip_f = torch.rand(batch, config.clip_len, config.clip_dim, generator=generator) + 2
    sync_f = torch.randn(batch, config.sync_len, config.sync_dim, generator=generator) * 0.1
    return clip_f, sync_f, torch.randn(batch, config.text_len, config.text_dim, generator=generator)


def _noise(policy: Policy, batch: int) -> Tensor:
    return torch.randn(policy.noise_shape(batch), generator=torch.Generator().manual_seed(2))


# --- the latent transform --------------------------------------------------------------------------------


def test_whitened_latents_are_uncorrelated_and_of_mean_variance_one() -> None:
    policy, (latents, _, _) = _fitted(), _training_split()
    tokens = policy.transform.normalize(latents).reshape(-1, 32)
    covariance = tokens.T.cov()
    torch.testing.assert_close(tokens.mean(0), torch.zeros(32), atol=1e-3, rtol=0)
    torch.testing.assert_close(covariance - covariance.diagonal().diag(), torch.zeros(32, 32), atol=1e-2, rtol=0)
    assert covariance.diagonal().mean().item() == pytest.approx(1, rel=1e-3)


def test_whitening_levels_strong_components_and_leaves_noise_small() -> None:
    variances = torch.tensor([100.0] * 8 + [0.1] * 32 + [0.0] * 120, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(160, 160, generator=generator, dtype=torch.float64))
    tokens = (torch.randn(64, 40, 160, generator=generator, dtype=torch.float64) * variances.sqrt()) @ rotation
    moments, transform = StreamingMoments(160, with_covariance=True), Whitening(160, 32)
    moments.update(tokens)
    transform.fit(moments)
    stds = transform.normalize(tokens).reshape(-1, 32).std(0)
    assert stds[:8].min() > 1.5
    torch.testing.assert_close(stds[:8], stds[0].expand(8), rtol=0.02, atol=0)
    assert stds[8:].max() < 0.4


def test_the_projection_is_orthonormal_up_to_its_scales_and_inverts_exactly() -> None:
    transform = _fitted().transform
    assert isinstance(transform, Whitening)
    latents = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(transform.normalize(transform.unnormalize(latents)), latents, atol=1e-3, rtol=1e-3)
    components = transform.projection / transform.projection.norm(dim=0)
    torch.testing.assert_close(components.T @ components, torch.eye(32), atol=1e-4, rtol=0)


def test_reconstruction_keeps_what_principal_components_can_keep() -> None:
    policy, (latents, _, _) = _fitted(), _training_split()
    restored = policy.transform.unnormalize(policy.transform.normalize(latents))
    lost = (restored - latents).reshape(-1, 160).double().T.cov().trace()
    best = torch.linalg.eigvalsh(latents.reshape(-1, 160).double().T.cov())[:-32].sum()
    assert 0 < lost.item() == pytest.approx(best.item(), rel=0.05)


def test_statistics_do_not_depend_on_how_clips_are_batched() -> None:
    one, many = _fitted(batch_size=1), _fitted(batch_size=7)
    assert isinstance(one.transform, Whitening)
    assert isinstance(many.transform, Whitening)
    for a, b in zip(one.transform.buffers(), many.transform.buffers(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(one.network.buffers(), many.network.buffers(), strict=True):
        assert torch.equal(a, b)


def test_condition_statistics_are_fitted_with_the_latents_and_nulls_start_at_the_mean() -> None:
    policy, (_, clip_f, sync_f) = _fitted(), _training_split()
    statistics = policy.network.condition_statistics
    assert statistics is not None
    torch.testing.assert_close(statistics.clip_mean, clip_f.mean((0, 1)))
    torch.testing.assert_close(statistics.clip_std, clip_f.reshape(-1, 192).std(0))
    stds = sync_f.reshape(-1, 576).std(0)
    torch.testing.assert_close(statistics.sync_std, stds.clamp(min=0.5 * stds.mean().item()))
    torch.testing.assert_close(policy.network.empty_sync_feat[0], sync_f.mean((0, 1)))


def test_named_sizes_keep_mean_and_unbiased_std_of_each_channel_in_the_network() -> None:
    network = golden_network()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(6, 50, 20, generator=generator) * 3 + 1
    policy = Policy(network, ChannelTransform(network), "small_16k")
    policy.fit_statistics(
        [(latents[:4], torch.zeros(4, 1, 48), torch.zeros(4, 1, 40)), (latents[4:], latents, latents)]
    )
    tokens = latents.reshape(-1, 20)
    torch.testing.assert_close(network.latent_mean.flatten(), tokens.mean(0))
    torch.testing.assert_close(network.latent_std.flatten(), tokens.std(0))
    torch.testing.assert_close(policy.transform.normalize(latents).reshape(-1, 20).std(0), torch.ones(20))
    torch.testing.assert_close(policy.transform.unnormalize(policy.transform.normalize(latents)), latents)


def test_statistics_of_nothing_or_of_too_few_directions_are_refused() -> None:
    with pytest.raises(ValueError, match="training split is empty"):
        Policy.create("tiny", seed=0).fit_statistics([])
    flat = torch.zeros(4, 40, 160), torch.zeros(4, 3, 192), torch.zeros(4, 40, 576)
    with pytest.raises(ValueError, match="fewer than 32 directions"):
        Policy.create("tiny", seed=0).fit_statistics([flat])


# --- generation ------------------------------------------------------------------------------------------


def test_guided_generation_agrees_with_the_original_down_to_stored_latents(fixtures: Path) -> None:
    golden, network = golden_vectors(fixtures), golden_network()
    policy = Policy(network, ChannelTransform(network), "small_16k")
    features = golden["in.clip_f"], golden["in.sync_f"], golden["in.text_f"]
    latents = policy.generate(*features, golden["gen.x0"], num_steps=25, guidance=4.5)
    assert relative_error(latents, golden["gen.x1_unnormalized"]) < 1e-3
    negative = policy.generate(
        *features, golden["gen.x0"], num_steps=25, guidance=4.5, negative_text=golden["in.neg_text"]
    )
    expected = golden["gen.x1_cfg4.5_25steps_negative"] * network.latent_std + network.latent_mean
    assert relative_error(negative, expected) < 1e-3


def test_tiny_generates_stored_latents_and_repeats_them_from_the_same_noise() -> None:
    policy, features = _fitted(), _features(2)
    latents = policy.generate(*features, _noise(policy, 2), num_steps=2, guidance=2.0)
    spec = SPECS[policy.spec_name]
    assert latents.shape == (2, spec.latent_len, spec.latent_dim)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, policy.generate(*features, _noise(policy, 2), num_steps=2, guidance=2.0))


def test_one_clip_with_many_candidates_equals_the_clip_repeated() -> None:
    policy, features = _fitted(), _features(1)
    noise = _noise(policy, 3)
    together = policy.generate(*features, noise, num_steps=2, guidance=1.5)
    repeated = policy.generate(*(f.repeat(3, 1, 1) for f in features), noise, num_steps=2, guidance=1.5)
    assert relative_error(together, repeated) < 1e-4
    assert relative_error(together[:1], together[1:2]) > 0.1


def test_half_precision_features_are_accepted_as_they_are_stored() -> None:
    policy, features = _fitted(), _features(1)
    noise = _noise(policy, 1)
    stored = policy.generate(*(f.half() for f in features), noise, num_steps=2, guidance=1.0)
    assert relative_error(stored, policy.generate(*features, noise, num_steps=2, guidance=1.0)) < 0.1


def test_a_bf16_network_samples_in_float32_state() -> None:
    policy, features = _fitted(), _features(1)
    noise = _noise(policy, 1)
    expected = policy.generate(*features, noise, num_steps=4, guidance=1.0)
    latents = policy.to("cpu", torch.bfloat16).generate(*features, noise, num_steps=4, guidance=1.0)
    assert latents.dtype == torch.float32
    assert (latents - expected).square().mean().sqrt() < 0.1 * expected.std()


def test_noise_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="noise has shape"):
        _fitted().generate(*_features(1), torch.zeros(1, 40, 160), num_steps=1, guidance=1.0)


# --- sampling on from a real sound -----------------------------------------------------------------------


def test_what_starts_at_the_end_is_the_sound_itself_but_for_what_the_transform_loses() -> None:
    policy, features = _fitted(), _features(1)
    latents, noise = _training_split()[0][:1], _noise(policy, 2)
    kept = policy.regenerate(*features, latents, noise, torch.ones(2), num_steps=3, guidance=2.0)
    expected = policy.transform.unnormalize(policy.transform.normalize(latents)).expand(2, -1, -1)
    torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_what_starts_at_nought_is_a_sample_whatever_the_sound_was(guidance: float) -> None:
    policy, features = _fitted(), _features(1)
    latents, noise = _training_split()[0][:1], _noise(policy, 2)
    sampled = policy.generate(*features, noise, num_steps=4, guidance=guidance)
    again = policy.regenerate(*features, latents, noise, torch.zeros(2), num_steps=4, guidance=guidance)
    assert again.dtype == torch.float32
    assert relative_error(again, sampled) < 1e-4


def test_versions_of_one_batch_do_not_depend_on_each_other_and_guidance_matters() -> None:
    policy, features = _fitted(), _features(1)
    latents, noise, start = _training_split()[0][:1], _noise(policy, 3), torch.tensor([0.5, 0.3, 0.1])
    together = policy.regenerate(*features, latents, noise, start, num_steps=3, guidance=2.0)
    for b in range(3):
        one = slice(b, b + 1)
        alone = policy.regenerate(*features, latents, noise[one], start[one], num_steps=3, guidance=2.0)
        assert relative_error(together[one], alone) < 1e-4
    plain = policy.regenerate(*features, latents, noise, start, num_steps=3, guidance=1.0)
    assert relative_error(plain, together) > 1e-3


def test_a_blind_policy_hears_the_sound_alone() -> None:
    """The same for every picture and guidance: the field of the null conditions."""
    policy = _fitted()
    latents, noise, start = _training_split()[0][:1], _noise(policy, 2), torch.tensor([0.5, 0.1])
    one, other = _features(1), tuple(-feature for feature in _features(1))
    blind = [
        policy.regenerate(*features, latents, noise, start, 3, guidance, blind=True)
        for features, guidance in ((one, 1.0), (other, 3.0))
    ]
    assert torch.equal(*blind)
    null = policy.network.empty_features(1)
    torch.testing.assert_close(blind[0], policy.regenerate(*null, latents, noise, start, 3, 1.0))
    assert relative_error(policy.regenerate(*one, latents, noise, start, 3, 1.0), blind[0]) > 1e-3


def test_noise_or_starts_that_do_not_fit_are_refused() -> None:
    policy, latents = _fitted(), torch.zeros(1, 40, 160)
    with pytest.raises(ValueError, match="noise has shape"):
        policy.regenerate(*_features(1), latents, latents, torch.ones(1), num_steps=1, guidance=1.0)
    with pytest.raises(ValueError, match="start has shape"):
        policy.regenerate(*_features(1), latents, _noise(policy, 2), torch.ones(1), num_steps=1, guidance=1.0)


# --- on disk ---------------------------------------------------------------------------------------------


def test_a_policy_comes_back_bit_for_bit(tmp_path: Path) -> None:
    policy = _fitted()
    assert policy.save(tmp_path) == ["config.json", "network.safetensors", "transform.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == policy.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"kind": "mmdit", "size": "tiny", "spec": "tiny"}
    loaded = Policy.load(tmp_path)
    for name, tensor in policy.network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], tensor), name
    assert isinstance(loaded.transform, Whitening)
    assert isinstance(policy.transform, Whitening)
    for name, tensor in policy.transform.state_dict().items():
        assert torch.equal(loaded.transform.state_dict()[name], tensor), name
    features, noise = _features(1), _noise(policy, 1)
    assert torch.equal(
        loaded.generate(*features, noise, num_steps=2, guidance=1.0),
        policy.generate(*features, noise, num_steps=2, guidance=1.0),
    )


def test_creation_repeats_from_its_seed_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second, other = Policy.create("tiny", 5), Policy.create("tiny", 5), Policy.create("tiny", 6)
    assert torch.equal(before, torch.get_rng_state())
    name = "audio_input_proj.0.weight"
    assert torch.equal(first.network.get_parameter(name), second.network.get_parameter(name))
    assert not torch.equal(first.network.get_parameter(name), other.network.get_parameter(name))
    assert all(torch.isfinite(buffer).all() for buffer in first.network.buffers())


def test_a_folder_that_is_no_policy_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        Policy.load(tmp_path)
    _fitted().save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"kind": "mmdit", "size": "huge"}))
    with pytest.raises(ValueError, match="'huge'; known sizes: tiny, small_16k"):
        Policy.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"kind": "mmdit", "size": "tiny"}))
    (tmp_path / "transform.safetensors").unlink()
    with pytest.raises(ValueError, match=r"transform\.safetensors"):
        Policy.load(tmp_path)
    with pytest.raises(ValueError, match="unknown size"):
        Policy.create("huge", seed=0)


@pytest.mark.gpu
def test_a_policy_generates_the_same_on_cuda(tmp_path: Path) -> None:
    policy = _fitted()
    policy.save(tmp_path)
    features, noise = _features(1), _noise(policy, 2)
    expected = policy.generate(*features, noise, num_steps=4, guidance=2.0)
    latents = Policy.load(tmp_path, "cuda").generate(*features, noise, num_steps=4, guidance=2.0)
    assert relative_error(latents.cpu(), expected) < 1e-2
