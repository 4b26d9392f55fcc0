"""The list of published networks, and what is said of weights that are not what they should be."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.mmdit import SIZES
from models.vocoder import fold_weight_norm
from pipelines.errors import InputError
from pipelines.public_files import FileIdentity
from pipelines.public_models import PUBLIC_MODELS, ROLES, PublicModel, check_identity, find_model, refuse_other_size
from tests.models.mmdit_golden import TINY_V1
from tests.pipelines import public_factory
from tests.pipelines.public_factory import OTHER_SIZE, SYNCH, VAES, VOCODERS, use_tiny_sizes


@pytest.fixture(autouse=True)
def tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiny_sizes(monkeypatch)


def public(role: str, size: str = "small_16k") -> PublicModel:
    return find_model(PUBLIC_MODELS, role, size)


def identity(md5: str) -> FileIdentity:
    return FileIdentity(path=Path("/w/mine.pth"), bytes=1, md5=md5, sha256="0" * 64)


def test_every_public_size_has_all_five_networks() -> None:
    assert {m.variant for m in PUBLIC_MODELS if m.role == "network"} == SIZES.keys() - {"tiny"}
    for size in SIZES.keys() - {"tiny"}:
        assert [public(role, size).role for role in ROLES] == list(ROLES)
    assert public("vae", "large_44k_v2").file_name == "v1-44.pth"
    assert public("vocoder", "small_16k").file_name == "best_netG.pt"


def test_a_size_without_public_weights_is_refused_with_those_that_have_some() -> None:
    with pytest.raises(InputError, match=r"--size tiny: no network is published.*small_16k, small_44k, medium_44k"):
        public("network", "tiny")


def test_no_md5_stands_twice_and_every_licence_is_said() -> None:
    known = [m.md5 for m in PUBLIC_MODELS if m.md5 is not None]
    assert len(known) == len(set(known)) == 9
    assert all(len(md5) == 32 for md5 in known)
    assert all(m.licence for m in PUBLIC_MODELS)
    assert all("CC-BY-NC 4.0" in m.licence for m in PUBLIC_MODELS if m.role in ("network", "vae"))


def test_a_published_file_is_recognised_and_an_unknown_one_needs_trust() -> None:
    wanted = public("network")
    assert wanted.md5 is not None
    assert check_identity(wanted, identity(wanted.md5), PUBLIC_MODELS, trust_unknown=False)
    assert not check_identity(wanted, identity("f" * 32), PUBLIC_MODELS, trust_unknown=True)
    with pytest.raises(InputError, match="--trust-unknown-checksum") as error:
        check_identity(wanted, identity("f" * 32), PUBLIC_MODELS, trust_unknown=False)
    for part in ("--network /w/mine.pth", "f" * 32, wanted.md5, wanted.file_name):
        assert part in str(error.value)


def test_a_network_without_an_md5_on_record_needs_no_trust_and_is_not_called_published() -> None:
    for role, size in (("vocoder", "small_44k"), ("clip", "small_16k")):
        assert not check_identity(public(role, size), identity("f" * 32), PUBLIC_MODELS, trust_unknown=False)
    known = public("network", "small_44k").md5
    assert known is not None
    with pytest.raises(InputError, match=r"--clip /w/mine.pth is the network of small_44k"):
        check_identity(public("clip"), identity(known), PUBLIC_MODELS, trust_unknown=False)


@pytest.mark.parametrize("trust", [True, False])
def test_another_published_file_is_called_by_its_name(trust: bool) -> None:
    md5 = public("network", "small_44k").md5
    assert md5 is not None
    with pytest.raises(InputError, match=r"is the network of small_44k.*wanted is the network of small_16k"):
        check_identity(public("network"), identity(md5), PUBLIC_MODELS, trust_unknown=trust)


def test_known_extra_keys_are_dropped_and_weight_norm_is_folded() -> None:
    network = public_factory.network_state(TINY_V1)
    assert network.keys() - public("network").checked(network, "f").keys() == {
        "t_embed.freqs",
        "latent_rot",
        "clip_rot",
    }
    synchformer = public_factory.synchformer_state(SYNCH)
    kept = public("synchformer").checked(synchformer, "f")
    assert kept.keys() == {name for name in synchformer if name.startswith("vfeat_extractor.")}
    vocoder = public_factory.vocoder_state(VOCODERS["16k"])
    folded = public("vocoder").checked(vocoder, "f")
    assert folded.keys() == fold_weight_norm(vocoder).keys()
    norms = folded["conv_pre.weight"].flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, vocoder["conv_pre.weight_g"].flatten())


def test_the_vaes_weights_stay_raw() -> None:
    state = public_factory.vae_state(VAES["16k"])
    checked = public("vae").checked(state, "f")
    assert all(torch.equal(checked[name], tensor) for name, tensor in state.items())


def test_missing_unknown_and_misshapen_weights_are_named_with_their_file() -> None:
    state = public_factory.network_state(TINY_V1)
    del state["clip_cond_proj.bias"]
    state["surplus"] = torch.zeros(1)
    state["sync_pos_emb"] = torch.zeros(1, 1, 8, 41)
    with pytest.raises(InputError, match=r"1 missing: clip_cond_proj\.bias") as error:
        public("network").checked(state, "/w/mine.pth")
    for part in ("/w/mine.pth", "1 unknown: surplus", "sync_pos_emb [1, 1, 8, 41] instead of [1, 1, 8, 40]"):
        assert part in str(error.value)


def test_a_gain_without_its_direction_is_named() -> None:
    state = public_factory.vocoder_state(VOCODERS["16k"])
    del state["conv_pre.weight_v"]
    with pytest.raises(InputError, match=r"conv_pre\.weight_g has no conv_pre\.weight_v"):
        public("vocoder").checked(state, "f")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    state = public_factory.network_state(TINY_V1)
    for name in ("clip_cond_proj.bias", "fused_blocks.1.attn.qkv.weight"):
        state[name] = state[name].clone()
        state[name].view(-1)[-1] = value
    with pytest.raises(
        InputError, match=r"2 weights hold NaN or infinity: clip_cond_proj\.bias, fused_blocks\.1\.attn\.qkv"
    ):
        public("network").checked(state, "f")


def test_statistics_that_were_never_set_are_told_apart_from_a_training_that_diverged() -> None:
    state = public_factory.network_state(TINY_V1)
    nothing = torch.full((1, 1, TINY_V1.latent_dim), float("nan"))
    with pytest.raises(InputError, match=r"latent_mean and latent_std not finite: the statistics .* never set"):
        public("network").checked(state | {"latent_mean": nothing, "latent_std": nothing}, "f")


def test_weights_of_another_network_are_recognised_by_their_shapes() -> None:
    wanted = public("network")
    with pytest.raises(
        InputError, match=r"holds weights of the network of small_44k.*wanted is the network of small_16k"
    ):
        refuse_other_size(wanted, public_factory.network_state(OTHER_SIZE), "f", PUBLIC_MODELS)
    with pytest.raises(InputError, match=r"--network f holds weights of the vae of 16k"):
        refuse_other_size(wanted, public_factory.vae_state(VAES["16k"]), "f", PUBLIC_MODELS)
    refuse_other_size(wanted, public_factory.network_state(replace(TINY_V1, latent_dim=7)), "f", PUBLIC_MODELS)
