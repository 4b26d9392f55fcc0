"""Published files become an artifact that opens as a policy, and wrong ones leave nothing behind."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.clip import FrozenCLIP
from models.mmdit import SIZES, MMDiT
from models.policy import Policy
from models.synchformer import Synchformer
from models.vae import vae_from_public
from models.vocoder import BigVGAN
from models.weights import load_strict
from pipelines.data.local_files import TEMPORARY_SUFFIX
from pipelines.data.store import CHECKPOINT, open_files
from pipelines.errors import EnvironmentFailed, InputError, StageConflict
from pipelines.imports import import_mmaudio
from pipelines.public_files import identify
from pipelines.public_models import PUBLIC_MODELS
from pipelines.stage import untracked
from tests.models.mmdit_golden import TINY_V1, seeded
from tests.pipelines import public_factory
from tests.pipelines.public_factory import CLIP, SYNCH, VAES, VOCODERS, use_tiny_sizes, write_full_size, write_published

ROOT = Path(__file__).resolve().parents[2]
RUN_AND_MEASURE = """
import sys
from pathlib import Path
from jobs import cli, import_mmaudio
import_mmaudio.main(cli.parse("import_mmaudio", import_mmaudio.Options, sys.argv[1:]))
status = Path("/proc/self/status").read_text()
print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""
"""The job, and then the peak memory of its process alone (a child's resource usage counts its parent's too)."""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    torch.set_num_threads(1)
    use_tiny_sizes(monkeypatch)
    return write_published(tmp_path / "published")


def run(files: dict[str, str], out: Path, size: str = "small_16k", *, trust: bool = True) -> tuple[str, list[str]]:
    lines: list[str] = []
    outcome = import_mmaudio(
        files=files, size=size, out=str(out), trust_unknown_checksum=trust, track=untracked, say=lines.append
    )
    return outcome, lines


def refusal(files: dict[str, str], out: Path, *, trust: bool = True) -> str:
    with pytest.raises(InputError) as error:
        run(files, out, trust=trust)
    message = str(error.value)
    assert "\n" not in message
    assert not out.exists(), "a refused file left something behind"
    return message


def velocity(network: MMDiT) -> Tensor:
    config = network.config
    inputs = (
        seeded("latent", (1, config.latent_len, config.latent_dim)),
        seeded("clip", (1, config.clip_len, config.clip_dim)),
        seeded("sync", (1, config.sync_len, config.sync_dim)),
        seeded("text", (1, config.text_len, config.text_dim)),
        torch.tensor([0.3]),
    )
    with torch.no_grad():
        return network.eval()(*inputs)


def original_velocity(path: str, size: str) -> Tensor:
    network = MMDiT(SIZES[size])
    state = torch.load(path, weights_only=True)
    network.load_state_dict({name: state[name] for name in network.state_dict()})
    return velocity(network)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "stage.json"}


def test_the_artifact_opens_as_a_policy_with_the_published_velocity(files: dict[str, str], tmp_path: Path) -> None:
    assert run(files, tmp_path / "m0")[0] == "run"
    folder, manifest = open_files(str(tmp_path / "m0"), CHECKPOINT)
    policy = Policy.load(folder.local_path())
    assert (policy.size, policy.spec_name) == (manifest["size"], manifest["spec"]) == ("small_16k", "16k")
    assert torch.equal(velocity(policy.network), original_velocity(files["network"], "small_16k"))
    assert torch.equal(policy.network.latent_mean, torch.load(files["network"], weights_only=True)["latent_mean"])


def test_the_policys_files_are_those_that_a_policy_saves(files: dict[str, str], tmp_path: Path) -> None:
    run({"network": files["network"]}, tmp_path / "m0")
    (tmp_path / "saved").mkdir()
    for name in Policy.load(tmp_path / "m0").save(tmp_path / "saved"):
        assert (tmp_path / "m0" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


def test_codec_vocoder_synchformer_and_clip_lie_beside_it_and_load_strictly(
    files: dict[str, str], tmp_path: Path
) -> None:
    run(files, tmp_path / "m0")
    vae = vae_from_public(VAES["16k"], load_file(tmp_path / "m0" / "vae.safetensors"), "m0")
    expected = vae_from_public(VAES["16k"], public_factory.vae_state(VAES["16k"]), "published")
    mel = seeded("mel", (1, 80, 8))
    assert torch.equal(vae.encode(mel)[0], expected.encode(mel)[0])
    load_strict(BigVGAN(VOCODERS["16k"]), load_file(tmp_path / "m0" / "vocoder.safetensors"), "m0")
    load_strict(Synchformer(SYNCH), load_file(tmp_path / "m0" / "synchformer.safetensors"), "m0")
    load_strict(FrozenCLIP(CLIP), load_file(tmp_path / "m0" / "clip.safetensors"), "m0")


def test_manifest_and_lines_say_what_it_was_made_from_and_under_which_licence(
    files: dict[str, str], tmp_path: Path
) -> None:
    _, lines = run(files, tmp_path / "m0")
    manifest = open_files(str(tmp_path / "m0"), CHECKPOINT)[1]
    assert manifest["sources"].keys() == files.keys()
    for role, path in files.items():
        found, entry = identify(Path(path)), manifest["sources"][role]
        assert (entry["md5"], entry["sha256"], entry["bytes"]) == (found.md5, found.sha256, found.bytes)
        assert entry["is_published"] is False
        said = [line for line in lines if f" {role} " in line]
        assert len(said) == 1
        known = "no checksum of it is on record here" if role == "clip" else "not the published file"
        assert f"md5 {found.md5} ({known}" in said[0]
        assert entry["licence"] in said[0]
    assert {file["path"] for file in manifest["files"]} == {
        "config.json",
        *(entry["file"] for entry in manifest["sources"].values()),
    }


def test_the_published_file_needs_no_trust(files: dict[str, str], tmp_path: Path) -> None:
    md5 = identify(Path(files["network"])).md5
    models = tuple(replace(m, md5=md5) if m.variant == "small_16k" else m for m in PUBLIC_MODELS)
    lines: list[str] = []
    given = {"files": {"network": files["network"]}, "size": "small_16k", "out": str(tmp_path / "m0")}
    import_mmaudio(**given, models=models, track=untracked, say=lines.append)
    assert "(as published)" in lines[0]
    assert open_files(given["out"], CHECKPOINT)[1]["sources"]["network"]["is_published"] is True


def test_again_is_a_skip_and_other_files_are_refused(files: dict[str, str], tmp_path: Path) -> None:
    run(files, tmp_path / "m0")
    before = contents(tmp_path / "m0")
    outcome, lines = run(files, tmp_path / "m0")
    assert outcome == "skip"
    assert len(lines) == 1
    with pytest.raises(StageConflict, match=r"vae: .* there, null asked"):
        run({"network": files["network"]}, tmp_path / "m0")
    state = torch.load(files["network"], weights_only=True)
    torch.save(state | {"latent_mean": state["latent_mean"] + 1}, files["network"])
    with pytest.raises(StageConflict, match="network: "):
        run(files, tmp_path / "m0")
    assert contents(tmp_path / "m0") == before


def test_a_file_may_move_and_be_called_otherwise(files: dict[str, str], tmp_path: Path) -> None:
    run(files, tmp_path / "m0")
    moved = Path(files["network"]).rename(tmp_path / "mine.ckpt")
    assert run({**files, "network": str(moved)}, tmp_path / "m0")[0] == "skip"


def test_a_broken_off_import_goes_on_and_ends_the_same(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(files, tmp_path / "whole")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.imports.save_config", killed)
        with pytest.raises(KeyboardInterrupt):
            run(files, tmp_path / "m0")
    (tmp_path / "m0" / f".vae.safetensors.0{TEMPORARY_SUFFIX}").write_bytes(b"half")
    (tmp_path / "m0" / "vae.safetensors").unlink()
    with pytest.raises(InputError, match="is not finished"):
        open_files(str(tmp_path / "m0"), CHECKPOINT)
    assert run(files, tmp_path / "m0")[0] == "resume"
    assert contents(tmp_path / "m0") == contents(tmp_path / "whole")


def test_half_precision_and_tied_weights_come_out_whole_in_float32(files: dict[str, str], tmp_path: Path) -> None:
    state = torch.load(files["network"], weights_only=True)
    half = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    half["text_cond_proj.bias"] = half["clip_cond_proj.bias"]
    half["clip_cond_proj.weight"] = half["clip_cond_proj.weight"].T.contiguous().T
    torch.save(half, files["network"])
    run({"network": files["network"]}, tmp_path / "m0")
    written = load_file(tmp_path / "m0" / "network.safetensors")
    assert all(
        tensor.dtype == torch.float32 and torch.equal(tensor, half[name].float()) for name, tensor in written.items()
    )


@pytest.mark.parametrize("role", ["network", "vae", "vocoder", "synchformer"])
def test_a_wrong_file_of_any_role_leaves_nothing_behind(files: dict[str, str], tmp_path: Path, role: str) -> None:
    other = files["synchformer" if role == "vae" else "vae"]
    whole = Path(files[role]).read_bytes()
    assert f"--{role} {other} holds weights of the " in refusal({**files, role: other}, tmp_path / "m0")
    assert "no file" in refusal({**files, role: str(tmp_path / "absent")}, tmp_path / "m0")
    assert "is a folder" in refusal({**files, role: str(tmp_path)}, tmp_path / "m0")
    assert "no local file" in refusal({**files, role: "s3://bucket/x.pth"}, tmp_path / "m0")
    assert "--trust-unknown-checksum" in refusal(files, tmp_path / "m0", trust=False)
    Path(files[role]).write_bytes(whole[: len(whole) // 2])
    assert "not a whole torch checkpoint" in refusal(files, tmp_path / "m0")


def test_another_size_is_called_by_its_name(files: dict[str, str], tmp_path: Path) -> None:
    torch.save(public_factory.network_state(replace(TINY_V1, latent_dim=40)), files["network"])
    message = refusal(files, tmp_path / "m0")
    assert "holds weights of the network of small_44k" in message
    assert "wanted is the network of small_16k" in message


def test_a_pickle_that_would_run_a_command_is_refused_and_runs_nothing(files: dict[str, str], tmp_path: Path) -> None:
    touched = tmp_path / "touched"

    class Payload:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {touched}",)

    state = torch.load(files["network"], weights_only=True)
    torch.save({**state, "x": Payload()}, files["network"])
    assert "would call posix.system" in refusal(files, tmp_path / "m0")
    assert "--trust-unknown-checksum" in refusal(files, tmp_path / "m0", trust=False)
    assert not touched.exists()


def test_a_policy_needs_its_network_and_a_folder_that_is_mounted(files: dict[str, str], tmp_path: Path) -> None:
    assert "--network is missing" in refusal({"vae": files["vae"]}, tmp_path / "m0")
    with pytest.raises(InputError, match="cannot open 'mock:///m0'; use a path"):
        import_mmaudio(files=files, size="small_16k", out="mock:///m0", track=untracked)


def test_storage_that_fails_is_a_failed_environment_and_the_same_command_resumes(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.imports.save_file", full)
        with pytest.raises(EnvironmentFailed, match=r"network\.safetensors.*No space left"):
            run(files, tmp_path / "m0")
    assert not list((tmp_path / "m0").glob("*.safetensors*"))
    assert run(files, tmp_path / "m0")[0] == "resume"


@pytest.mark.slow
def test_at_true_size_the_policy_is_the_published_one_and_memory_stays_near_the_largest_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    roles = ("network", "vae", "vocoder", "synchformer")
    files = write_full_size(tmp_path / "published", "small_16k", roles)
    largest_bytes = max(Path(path).stat().st_size for path in files.values())
    out = tmp_path / "m0"
    flags = [word for role, path in files.items() for word in (f"--{role}", path)]
    words = ["small_16k", *flags, "--out", str(out), "--trust-unknown-checksum"]
    done = subprocess.run([sys.executable, "-c", RUN_AND_MEASURE, *words], cwd=ROOT, check=True, capture_output=True)
    peak_bytes = int(done.stdout.splitlines()[-1])
    with capsys.disabled():
        sys.stdout.write(f"\n  largest file {largest_bytes >> 20} MiB, peak of the import {peak_bytes >> 20} MiB\n")
    policy = Policy.load(open_files(str(out), CHECKPOINT)[0].local_path())
    assert torch.equal(velocity(policy.network), original_velocity(files["network"], "small_16k"))
    # Beside the largest file: what torch and the other libraries take, half a gigabyte, and one vocoder being folded.
    assert peak_bytes < largest_bytes + 1300 * 2**20
