from pathlib import Path

import pytest
import torch
from torch import nn

from models.mmdit import MMDiT
from models.weights import (
    load_config,
    load_strict,
    load_weights,
    save_config,
    save_weights,
    without_legacy_mmdit_keys,
)
from tests.models.mmdit_golden import TINY_V1, golden_network


def test_weights_come_back_bit_for_bit_whatever_their_dtype_and_layout(tmp_path: Path) -> None:
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    state = {
        "a": base,
        "transposed": base.T,
        "view": base[1],
        "half": base.to(torch.bfloat16),
        "nan": base * float("nan"),
    }
    save_weights(tmp_path / "w.safetensors", state)
    loaded = load_weights(tmp_path / "w.safetensors")
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no weights at .*absent"):
        load_weights(tmp_path / "absent.safetensors")
    whole = tmp_path / "w.safetensors"
    save_weights(whole, {"a": torch.zeros(1000)})
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut\.safetensors is not a whole safetensors file"):
        load_weights(cut)


def test_a_strict_load_names_what_is_missing_unknown_and_misshapen_in_one_line() -> None:
    state = nn.Linear(2, 3).state_dict()
    del state["bias"]
    state["weight"] = torch.zeros(3, 5)
    state["surplus"] = torch.zeros(1)
    with pytest.raises(ValueError, match="do not fit Linear") as error:
        load_strict(nn.Linear(2, 3), state, "somewhere")
    message = str(error.value)
    assert "1 missing: bias" in message
    assert "1 unknown: surplus" in message
    assert "weight [3, 5] instead of [3, 2]" in message
    assert "somewhere" in message
    assert "\n" not in message


def test_an_old_public_checkpoint_loads_strictly_once_its_tables_are_dropped() -> None:
    source = golden_network()
    old = dict(source.state_dict()) | {
        "t_embed.freqs": torch.zeros(128),
        "latent_rot": torch.zeros(1, 50, 16, 2, 2),
        "clip_rot": torch.zeros(1, 13, 16, 2, 2),
    }
    network = MMDiT(TINY_V1)
    with pytest.raises(ValueError, match=r"3 unknown: clip_rot, latent_rot, t_embed\.freqs"):
        load_strict(network, old, "old.pth")
    load_strict(network, without_legacy_mmdit_keys(old), "old.pth")
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), source.parameters(), strict=True))


def test_a_config_says_what_the_weights_are(tmp_path: Path) -> None:
    save_config(tmp_path / "config.json", {"kind": "mmdit", "size": "tiny"})
    assert load_config(tmp_path / "config.json", "mmdit")["size"] == "tiny"
    with pytest.raises(ValueError, match="kind 'sf_cavp'"):
        load_config(tmp_path / "config.json", "sf_cavp")
    with pytest.raises(ValueError, match="finished checkpoint"):
        load_config(tmp_path / "absent" / "config.json", "mmdit")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_config(tmp_path / "broken.json", "mmdit")
