from dataclasses import replace

import numpy as np
import pytest
import torch

from models.clip import CLIP_VIT_H_14, FrozenCLIP
from models.clip_synchformer import ClipSynchformerEncoders, distinct
from models.spec import SPECS
from models.synchformer import Synchformer, SynchformerConfig
from tests.models.mmdit_golden import fill_by_rule

SPEC = SPECS["16k"].with_duration(1.0)
"""8 frames for CLIP, 25 for Synchformer in two segments."""
CLIP = replace(
    CLIP_VIT_H_14,
    embed_dim=12,
    image_width=16,
    image_depth=1,
    image_head_width=16,
    text_width=16,
    text_depth=1,
    text_heads=1,
)


@pytest.fixture(scope="module")
def encoders() -> ClipSynchformerEncoders:
    torch.set_num_threads(1)
    clip, synchformer = FrozenCLIP(CLIP), Synchformer(SynchformerConfig(width=12, depth=1, num_heads=1, mlp_dim=12))
    for module in (clip, synchformer):
        fill_by_rule(module)
        module.eval().requires_grad_(False)
    return ClipSynchformerEncoders(SPEC, clip, synchformer)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8)


def frames(encoders: ClipSynchformerEncoders, seed: int = 0) -> dict:
    return {encoders.clip_grid: noise(8, 384, 384, seed=seed), encoders.sync_grid: noise(25, 224, 224, seed=seed)}


def test_features_are_what_the_networks_give_of_normalised_pixels(encoders: ClipSynchformerEncoders) -> None:
    given = frames(encoders)
    found = encoders.encode(given, "a bell")
    pixels = torch.from_numpy(given[encoders.clip_grid]).permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(
        torch.from_numpy(found["clip_features"]), encoders._clip.image_embeddings(pixels).half(), rtol=2e-3, atol=1e-3
    )
    moving = torch.from_numpy(given[encoders.sync_grid]).permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = encoders._synchformer.encode_frames(moving[None])[0]
    assert expected.shape == (SPEC.sync_len, 12)
    torch.testing.assert_close(torch.from_numpy(found["sync_features"]), expected.half(), rtol=2e-3, atol=2e-3)
    assert np.array_equal(found["text_features"], encoders.encode_text("a bell"))
    assert {values.dtype for values in found.values()} == {np.dtype(np.float16)}


def test_a_still_picture_is_encoded_once_and_stands_for_every_frame(
    encoders: ClipSynchformerEncoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = frames(encoders)
    varied = encoders.encode(given, "")
    for grid in encoders.grids:
        given[grid][3:] = given[grid][3]
    seen = {"clip": 0, "segments": 0}
    clip, synchformer = encoders._clip.image_embeddings, encoders._synchformer.forward

    def counted_clip(pixels: torch.Tensor) -> torch.Tensor:
        seen["clip"] += len(pixels)
        return clip(pixels)

    def counted_segments(segments: torch.Tensor) -> torch.Tensor:
        seen["segments"] += segments.shape[1]
        return synchformer(segments)

    monkeypatch.setattr(encoders._clip, "image_embeddings", counted_clip)
    monkeypatch.setattr(encoders._synchformer, "forward", counted_segments)
    still = encoders.encode(given, "")
    assert seen == {"clip": 4, "segments": 2}
    assert np.array_equal(still["clip_features"][3], still["clip_features"][7])
    np.testing.assert_allclose(still["clip_features"][:4], varied["clip_features"][:4], atol=1e-3)
    for grid in encoders.grids:
        given[grid][:] = given[grid][3]
    seen.update(clip=0, segments=0)
    constant = encoders.encode(given, "")
    assert seen == {"clip": 1, "segments": 1}
    np.testing.assert_allclose(constant["sync_features"][:8], constant["sync_features"][8:])


def test_distinct_items_keep_their_first_place() -> None:
    assert distinct([b"x", b"y", b"x", b"z", b"y"]) == ([0, 1, 3], [0, 1, 0, 2, 1])
    assert distinct([(1, 2), (1, 2)]) == ([0], [0, 0])


def test_frames_of_another_number_size_or_type_are_refused(encoders: ClipSynchformerEncoders) -> None:
    given = frames(encoders)
    with pytest.raises(ValueError, match=r"uint8 \(7, 384, 384, 3\), .* uint8 \(8, 384, 384, 3\)"):
        encoders.encode({**given, encoders.clip_grid: noise(7, 384, 384)}, "")
    with pytest.raises(ValueError, match=r"float32 .* want uint8"):
        encoders.encode({**given, encoders.sync_grid: given[encoders.sync_grid].astype(np.float32)}, "")
