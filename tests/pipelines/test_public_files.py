"""Foreign files are known by their bytes, and whatever is wrong with one is one line."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipelines.errors import InputError
from pipelines.public_files import identify, local_file, read_state_dict

STATE = {"a": torch.arange(3000.0), "b": torch.eye(5)[:, :2]}


class Payload:
    """A pickle of it runs a command when it is opened by an ordinary loader."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.touched}",)


def refusal(path: Path, entry: str | None = None) -> str:
    with pytest.raises(InputError) as error:
        read_state_dict(path, entry)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_a_file_of_the_hub_is_taken_from_its_cache_and_never_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.socket", None)
    snapshot = tmp_path / "models--apple--DFN5B" / "snapshots" / "abc"
    (snapshot / "weights").mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    (snapshot / "weights" / "x.bin").write_bytes(b"x")
    assert local_file("clip", "hf://apple/DFN5B/weights/x.bin") == snapshot / "weights" / "x.bin"
    with pytest.raises(InputError, match=r"DFN5B/y.bin is not in the hub's cache.*hf download apple/DFN5B y"):
        local_file("clip", "hf://apple/DFN5B/y.bin")
    with pytest.raises(InputError, match="hf://OWNER/REPOSITORY/FILE"):
        local_file("clip", "hf://apple/DFN5B")
    with pytest.raises(InputError, match="is no local file"):
        local_file("vae", "s3://bucket/v1-16.pth")
    assert local_file("vae", "/w/v1-16.pth") == Path("/w/v1-16.pth")


def test_a_file_is_known_by_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(b"some bytes")
    found = identify(path)
    assert found.bytes == 10
    assert found.md5 == hashlib.md5(b"some bytes").hexdigest()
    assert found.sha256 == hashlib.sha256(b"some bytes").hexdigest()


def test_no_file_a_folder_and_an_empty_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.pth").touch()
    for path, reason in ((tmp_path / "absent.pth", "no file"), (tmp_path, "folder"), (tmp_path / "empty.pth", "empty")):
        with pytest.raises(InputError, match=reason) as error:
            identify(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_a_state_dict_comes_back_as_it_was_saved(tmp_path: Path, as_zip: bool) -> None:
    torch.save(STATE, tmp_path / "x.pth", _use_new_zipfile_serialization=as_zip)
    found = read_state_dict(tmp_path / "x.pth")
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in STATE.items())


def test_parameters_an_entry_and_safetensors_are_read_too(tmp_path: Path) -> None:
    torch.save({"generator": {"a": torch.nn.Parameter(torch.ones(2))}, "steps": 3}, tmp_path / "g.pt")
    found = read_state_dict(tmp_path / "g.pt", "generator")
    assert found["a"].tolist() == [1.0, 1.0]
    assert not found["a"].requires_grad
    torch.save(STATE, tmp_path / "plain.pt")
    assert read_state_dict(tmp_path / "plain.pt", "generator").keys() == STATE.keys()
    save_file({"a": torch.ones(3)}, tmp_path / "s.safetensors")
    assert read_state_dict(tmp_path / "s.safetensors")["a"].tolist() == [1.0] * 3


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_a_pickle_that_would_run_a_command_is_refused_and_runs_nothing(tmp_path: Path, as_zip: bool) -> None:
    touched, path = tmp_path / "touched", tmp_path / "evil.pth"
    torch.save({**STATE, "x": Payload(touched)}, path, _use_new_zipfile_serialization=as_zip)
    message = refusal(path)
    assert not touched.exists()
    assert "would call posix.system" in message
    assert "nothing in it was run" in message
    # The payload is a real one: a loader that trusts the file runs it.
    torch.load(path, weights_only=False)
    assert touched.exists()


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("kept", [1, 9, 700, -100])
def test_a_file_that_is_cut_short_is_named(tmp_path: Path, name: str, kept: int) -> None:
    path = tmp_path / name
    if path.suffix == ".pth":
        torch.save(STATE, path)
    else:
        save_file({"a": STATE["a"]}, path)
    path.write_bytes(path.read_bytes()[:kept])
    assert "not a whole" in refusal(path)


@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html>\n" * 9, b"\x89PNG\r\n\x1a\n" * 9, b"version https://git-lfs\n", b"\x80\x02."]
)
def test_what_is_no_checkpoint_at_all_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    assert "not a whole torch checkpoint" in refusal(tmp_path / "x.pth")


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"it": 3, "weights": {"a": torch.ones(1)}}, r"no plain tensor \(it, weights\)"),
        ({"a": torch.ones(2, dtype=torch.int64)}, r"no plain tensor \(a\)"),
        ({"a": torch.eye(2).to_sparse()}, r"no plain tensor \(a\)"),
        ({"a": torch.ones(2, device="meta")}, r"no plain tensor \(a\)"),
        ({1: torch.ones(2)}, r"no plain tensor \(1\)"),
        ({}, "holds nothing"),
        ([torch.ones(2)], "holds a list"),
    ],
)
def test_what_is_no_state_dict_is_named(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(InputError, match=message):
        read_state_dict(tmp_path / "x.pth")
