"""What passes between the three steps, and what each refuses before it costs anything."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.encoders import build_encoders
from models.policy import Policy
from models.spec import SPECS
from models.weights import save_config
from pipelines.data.store import files_manifest
from pipelines.errors import InputError
from pipelines.generation_line import Arrays
from pipelines.generation_steps import (
    GenerationSettings,
    Networks,
    WindowsOfVideo,
    conditions_step,
    find_networks,
    latents_step,
    sound_step,
)
from pipelines.preferences.candidates import ConditionRow, Sampling, candidate_seeds, sample_candidates
from pipelines.stage import StageContext, run_stage
from tests.demo_factory import write_demo_video, write_untrained_policy, write_untrained_reward

TINY = SPECS["tiny"]
CPU = torch.device("cpu")


def settings(
    *,
    prompt: str = "",
    negative_prompt: str = "",
    guidance: float = 3.0,
    num_candidates: int = 1,
    bf16: bool = False,
) -> GenerationSettings:
    return GenerationSettings(
        prompt=prompt,
        negative_prompt=negative_prompt,
        encoders=None,
        seed=3,
        sampling=Sampling(num_steps=2, guidance=guidance),
        num_candidates=num_candidates,
        bf16=bf16,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_untrained_policy(folder / "policy")
    write_untrained_reward(folder / "reward")
    write_demo_video(folder / "in.mp4", 6.0)
    return folder


@pytest.fixture(scope="module")
def networks(root: Path) -> Networks:
    return find_networks(str(root / "policy"), None, None, CPU)


@pytest.fixture(scope="module")
def judged(root: Path) -> Networks:
    return find_networks(str(root / "policy"), str(root / "reward"), None, CPU)


def windows(root: Path) -> WindowsOfVideo:
    return WindowsOfVideo(path=root / "in.mp4", name="the video", starts_s=(0.0, 3.4))


def conditions(networks: Networks, own: GenerationSettings, video: WindowsOfVideo | None, index: int = 0) -> Arrays:
    with conditions_step(networks, own, video) as step:
        return step(index, {})


def latents(networks: Networks, own: GenerationSettings, given: Arrays, index: int = 0) -> np.ndarray:
    with latents_step(networks, own) as step:
        return step(index, given)["latents"]


def test_a_window_gives_what_its_step_needs_and_frames_only_for_a_reward(
    root: Path, networks: Networks, judged: Networks
) -> None:
    plain = conditions(networks, settings(), windows(root), index=1)
    assert {name: (array.shape, array.dtype) for name, array in plain.items()} == {
        "clip_features": ((3, 192), np.float16),
        "sync_features": ((40, 576), np.float16),
        "text_features": ((8, 64), np.float16),
    }
    assert not np.array_equal(plain["clip_features"], conditions(networks, settings(), windows(root))["clip_features"])
    more = conditions(judged, settings(negative_prompt="rain"), windows(root), index=1)
    assert set(more) - set(plain) == {"negative_text", "frames"}
    assert more["frames"].shape == (TINY.frames_len, TINY.frames_px, TINY.frames_px, 3)
    assert all(np.array_equal(plain[name], more[name]) for name in plain)
    assert np.array_equal(more["negative_text"], build_encoders("grids", TINY).encode_text("rain"))


def test_latents_are_those_that_preference_rounds_would_sample(root: Path, networks: Networks) -> None:
    given = conditions(networks, settings(), windows(root), index=1)
    own = settings(num_candidates=2)
    expected = sample_candidates(
        Policy.load(root / "policy"),
        ConditionRow(**{name: given[name] for name in ("clip_features", "sync_features", "text_features")}),
        candidate_seeds(own.seed, "generate", 1, 2),
        own.sampling,
    )
    found = latents(networks, own, given, index=1)
    assert np.array_equal(found, expected.numpy())
    assert not np.array_equal(found[0], found[1])
    assert not np.array_equal(latents(networks, own, given, index=0), found)


def test_without_a_picture_the_empty_features_of_the_policy_stand_for_it(root: Path, networks: Networks) -> None:
    own = settings(prompt="a bell")
    given = conditions(networks, own, None)
    assert set(given) == {"text_features"}
    policy = Policy.load(root / "policy")
    clip, sync, _ = policy.network.empty_features(1)
    assert clip.abs().max() > 0
    text = torch.from_numpy(given["text_features"].astype(np.float32))[None]
    noise = torch.randn(
        policy.noise_shape(1)[1:],
        generator=torch.Generator().manual_seed(candidate_seeds(own.seed, "generate", 0, 1)[0]),
    )
    expected = policy.generate(clip, sync, text, noise[None], own.sampling.num_steps, own.sampling.guidance)
    assert np.array_equal(latents(networks, own, given), expected.numpy())
    other = settings(prompt="a drum")
    assert not np.array_equal(latents(networks, other, conditions(networks, other, None)), expected.numpy())


def test_a_negative_prompt_pushes_away_from_itself_and_none_is_the_empty_string_of_the_policy(
    networks: Networks,
) -> None:
    """v = w v(prompt) + (1 - w) v(negative), so a negative that equals the prompt cancels the guidance."""
    plain = settings(prompt="bell")
    away = settings(prompt="bell", negative_prompt="drum")
    base = latents(networks, plain, conditions(networks, plain, None))
    assert not np.array_equal(latents(networks, away, conditions(networks, away, None)), base)
    same = settings(prompt="bell", negative_prompt="bell")
    conditional = settings(prompt="bell", guidance=1.0)
    cancelled = latents(networks, same, conditions(networks, same, None))
    expected = latents(networks, conditional, conditions(networks, conditional, None))
    # Without a picture both fields are then one and the same, whatever the strength.
    assert np.abs(cancelled - expected).max() < 1e-3
    assert np.abs(base - expected).max() > 1e-2


def test_the_reward_picks_the_best_and_passes_over_what_is_not_finite(root: Path, judged: Networks) -> None:
    own = settings(num_candidates=3)
    given = conditions(judged, own, windows(root))
    with latents_step(judged, own) as step:
        sampled = step(0, given)
    with sound_step(judged, own) as step:
        best = step(0, sampled)
        alone = [step(0, {**sampled, "latents": sampled["latents"][i : i + 1]}) for i in range(3)]
        rewards = [float(a["reward"]) for a in alone]
        winner = int(np.argmax(rewards))
        assert float(best["reward"]) == pytest.approx(rewards[winner], abs=1e-4)
        assert np.array_equal(best["wave"], alone[winner]["wave"])
        assert best["wave"].shape == (TINY.num_samples,)
        broken = sampled["latents"].copy()
        broken[winner, 0, 0] = np.nan
        second = sorted(range(3), key=lambda i: rewards[i])[1]
        assert np.array_equal(step(0, {**sampled, "latents": broken})["wave"], alone[second]["wave"])
        with pytest.raises(InputError, match="not finite"):
            step(0, {**sampled, "latents": np.full_like(broken, np.nan)})


def test_bfloat16_sampling_is_near_float32_and_its_latents_are_float32(root: Path, networks: Networks) -> None:
    given = conditions(networks, settings(), windows(root))
    exact = latents(networks, settings(), given)
    rounded = latents(networks, settings(bf16=True), given)
    assert rounded.dtype == np.float32
    assert not np.array_equal(rounded, exact)
    assert np.sqrt(np.square(rounded - exact).mean()) < 0.05 * exact.std()


def test_a_picture_that_cannot_be_used_is_named_as_the_user_called_it(root: Path, networks: Networks) -> None:
    cut = root / "cut.mp4"
    cut.write_bytes((root / "in.mp4").read_bytes()[:3_000])
    video = WindowsOfVideo(path=cut, name="s3://bucket/cut.mp4", starts_s=(0.0,))
    with pytest.raises(InputError, match=r"s3://bucket/cut.mp4 cannot be used \(truncated\)"):
        conditions(networks, settings(), video)


def artifact(out: Path, names: dict[str, bytes | dict[str, object]]) -> str:
    def body(context: StageContext) -> None:
        for name, content in names.items():
            if isinstance(content, bytes):
                (out / name).write_bytes(content)
            else:
                save_config(out / name, content)
        context.finish({"kind": "checkpoint", "files": files_manifest(context.folder, list(names))})

    run_stage(
        name="factory", config={"names": sorted(names)}, inputs={}, out=str(out), body=body, say=lambda line: None
    )
    return str(out)


def test_networks_of_a_named_size_are_asked_for_before_anything_is_loaded(tmp_path: Path) -> None:
    config: dict[str, object] = {"kind": "mmdit", "size": "small_16k", "spec": "16k"}
    bare = artifact(tmp_path / "m1", {"config.json": config, "network.safetensors": b""})
    with pytest.raises(InputError, match=r"m1 holds no synchformer.*clip.*vae.*vocoder.*--weights"):
        find_networks(bare, None, None, CPU)
    files = [f"{role}.safetensors" for role in ("vae", "vocoder", "synchformer", "clip")]
    whole = artifact(tmp_path / "m0", {"config.json": config, **dict.fromkeys(files, b"")})
    assert find_networks(whole, None, None, CPU).weights == tmp_path / "m0"
    found = find_networks(bare, None, whole, CPU)
    assert (found.policy, found.weights, found.spec.name) == (tmp_path / "m1", tmp_path / "m0", "16k")


def test_artifacts_of_another_kind_are_refused_before_anything_is_loaded(root: Path) -> None:
    policy, reward = str(root / "policy"), str(root / "reward")
    with pytest.raises(InputError, match="'mmdit'"):
        find_networks(reward, None, None, CPU)
    with pytest.raises(InputError, match="'sf_cavp'"):
        find_networks(policy, policy, None, CPU)
    with pytest.raises(InputError, match="does not exist"):
        find_networks(policy, str(root / "absent"), None, CPU)


def test_a_policy_that_cannot_be_loaded_is_one_line(tmp_path: Path, root: Path) -> None:
    weights = load_file(root / "policy" / "network.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if name != "sync_pos_emb"}, tmp_path / "n.safetensors")
    names: dict[str, bytes | dict[str, object]] = {
        "config.json": (root / "policy" / "config.json").read_bytes(),
        "transform.safetensors": (root / "policy" / "transform.safetensors").read_bytes(),
        "network.safetensors": (tmp_path / "n.safetensors").read_bytes(),
    }
    broken = find_networks(artifact(tmp_path / "m0", names), None, None, CPU)
    with pytest.raises(InputError, match="sync_pos_emb"):
        latents(broken, settings(), {})


def test_settings_that_would_be_ignored_are_refused() -> None:
    with pytest.raises(InputError, match="--negative-prompt acts through guidance"):
        settings(negative_prompt="drum", guidance=1.0)
    with pytest.raises(InputError, match="at least 1"):
        settings(num_candidates=0)
