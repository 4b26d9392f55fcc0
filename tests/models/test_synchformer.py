import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor

from models.synchformer import (
    STEPS,
    SYNCHFORMER,
    Axis,
    DividedAttention,
    DividedBlock,
    Synchformer,
    SynchformerConfig,
    segment_frames,
)
from models.weights import load_strict
from tests.models.mmdit_golden import fill_by_rule, relative_error, seeded

FORWARD_TOLERANCE = 2e-5  # 1.5e-6 measured: float32 accumulation order
BF16_TOLERANCE = 0.02  # RMS of the error over the RMS of the output; 0.006 measured
TINY = SynchformerConfig(width=48, depth=2, num_heads=4, mlp_dim=192)


def golden_synchformer() -> Synchformer:
    network = Synchformer(TINY)
    fill_by_rule(network)
    return network.eval()


def golden_segments() -> Tensor:
    """The golden input [1, 2, 16, 3, 224, 224]: a moving wave, another in every channel and segment."""

    def index(length: int, axes_behind: int) -> Tensor:
        return torch.arange(length, dtype=torch.float64).reshape(-1, *[1] * axes_behind)

    s, t, c, h, w = (index(length, 4 - axis) for axis, length in enumerate((2, 16, 3, 224, 224)))
    return torch.sin(0.11 * h * (c + 1) + 0.07 * w + 0.3 * t + 0.9 * s).float()[None]


@pytest.fixture(scope="module")
def network() -> Synchformer:
    torch.set_num_threads(1)
    return golden_synchformer()


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(Path(__file__).parents[1] / "fixtures" / "synchformer" / "tiny.safetensors")


@pytest.fixture(scope="module")
def segments() -> Tensor:
    return golden_segments()


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


# --- names, shapes, sizes -----------------------------------------------------------------------------------------


def test_the_full_size_has_exactly_the_public_names_and_shapes(fixtures: Path) -> None:
    public = json.loads(gzip.decompress((fixtures / "synchformer" / "public_size.json.gz").read_bytes()))
    with torch.device("meta"):
        full = Synchformer(SYNCHFORMER)
    assert {name: list(tensor.shape) for name, tensor in full.state_dict().items()} == public["shapes"]
    parameters = dict(full.named_parameters())
    assert parameters.keys() == full.state_dict().keys()
    assert sum(p.numel() for p in parameters.values()) == public["parameters"]
    assert sum(p.numel() for p in parameters.values() if p.requires_grad) == public["trainable"]
    assert [name for name, p in parameters.items() if not p.requires_grad] == public["frozen"]


@torch.no_grad()
def test_eight_seconds_give_192_vectors(network: Synchformer) -> None:
    frames = torch.zeros(1, 1, 3, 224, 224).expand(1, 200, -1, -1, -1)
    assert network.encode_frames(frames).shape == (1, 192, TINY.width)


@torch.no_grad()
def test_a_block_of_the_full_width_gives_vectors_of_width_768(segments: Tensor) -> None:
    # The meta device would do for the shape, but its first attention imports for longer than this one computes.
    wide = Synchformer(replace(SYNCHFORMER, depth=1))
    fill_by_rule(wide)
    features = wide(segments[:, :1])
    assert features.shape == (1, 1, 8, 768)
    assert torch.isfinite(features).all()


def test_the_picture_models_embedding_must_be_in_a_checkpoint_but_says_nothing(
    network: Synchformer, segments: Tensor
) -> None:
    state = network.state_dict()
    without = {name: tensor for name, tensor in state.items() if not name.startswith("vfeat_extractor.patch_embed.")}
    with pytest.raises(ValueError, match=r"2 missing: vfeat_extractor\.patch_embed\.proj\.bias"):
        load_strict(Synchformer(TINY), without, "a test")
    other = Synchformer(TINY)
    noise = {name: torch.full_like(state[name], torch.nan) for name in state.keys() - without.keys()}
    load_strict(other, without | noise, "a test")
    with torch.no_grad():
        assert torch.equal(other(segments[:, :1]), network(segments[:, :1]))


def test_a_width_that_does_not_divide_into_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of num_heads, got 50 and 4"):
        SynchformerConfig(width=50, depth=2, num_heads=4, mlp_dim=192)


def test_segments_of_another_size_are_refused(network: Synchformer) -> None:
    with pytest.raises(AssertionError, match="expected"):
        network(torch.zeros(1, 1, 16, 3, 112, 112))
    with pytest.raises(AssertionError, match="expected"):
        network(torch.zeros(1, 16, 3, 224, 224))


# --- the golden vectors: outputs of the original network on synthetic weights -----------------------------------------


def test_the_golden_input_is_the_wave_that_its_formula_says(segments: Tensor, golden: dict[str, Tensor]) -> None:
    torch.testing.assert_close(segments[0, ..., :4, :4], golden["in.corner"], atol=1e-6, rtol=0)


@torch.no_grad()
def test_forward_agrees_with_the_original(network: Synchformer, segments: Tensor, golden: dict[str, Tensor]) -> None:
    assert relative_error(network(segments), golden["out"]) < FORWARD_TOLERANCE


@torch.no_grad()
def test_each_block_agrees_with_the_original(network: Synchformer, segments: Tensor, golden: dict[str, Tensor]) -> None:
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _m, _i, out: seen.append(out)) for block in network.vfeat_extractor.blocks
    ]
    network(segments)
    for hook in hooks:
        hook.remove()
    assert len(seen) == TINY.depth
    for i, tokens in enumerate(seen):
        assert relative_error(tokens[:, :8], golden[f"block{i}.first8tokens"]) < FORWARD_TOLERANCE, i
        assert relative_error(tokens.mean(dim=1), golden[f"block{i}.mean"]) < FORWARD_TOLERANCE, i


@torch.no_grad()
def test_bf16_networks_and_autocast_stay_close_to_float32(
    network: Synchformer, segments: Tensor, golden: dict[str, Tensor]
) -> None:
    features = golden_synchformer().to(torch.bfloat16)(segments)
    assert features.dtype == torch.bfloat16
    assert relative_rms(features, golden["out"]) < BF16_TOLERANCE
    with torch.autocast("cpu", torch.bfloat16):
        features = network(segments)
    assert relative_rms(features, golden["out"]) < BF16_TOLERANCE


@pytest.mark.gpu
@torch.no_grad()
def test_cuda_agrees_with_the_original_in_float32_and_bf16(segments: Tensor, golden: dict[str, Tensor]) -> None:
    network = golden_synchformer().cuda()
    assert relative_error(network(segments.cuda()).cpu(), golden["out"]) < 1e-4
    assert relative_rms(network.to(torch.bfloat16)(segments.cuda()).cpu(), golden["out"]) < BF16_TOLERANCE


# --- divided attention: who sees whom -------------------------------------------------------------------------------


def _sees(axis: Axis, num_steps: int, num_patches: int) -> Tensor:
    """Bool (L, L): which token (column) the query of a row sees, by the definition and token for token."""
    frame_and_place = [(f, p) for f in range(num_steps) for p in range(num_patches)]
    shared = 1 if axis == "time" else 0
    sees = [[True] * (1 + len(frame_and_place))]
    sees += [[True, *(row[shared] == column[shared] for column in frame_and_place)] for row in frame_and_place]
    return torch.tensor(sees)


@torch.no_grad()
@pytest.mark.parametrize("axis", ["time", "space"])
def test_divided_attention_is_attention_over_all_tokens_under_its_mask(axis: Axis) -> None:
    num_steps, num_patches = 3, 5
    attention = DividedAttention(24, 2, axis)
    fill_by_rule(attention)
    x = seeded("tokens", (2, 1 + num_steps * num_patches, 24))
    q, k, v = (rearrange(part, "b l (h d) -> b h l d", h=2) for part in attention.qkv(x).chunk(3, dim=-1))
    scores = (q @ k.mT / 12**0.5).masked_fill(~_sees(axis, num_steps, num_patches), -torch.inf)
    expected = attention.proj(rearrange(scores.softmax(dim=-1) @ v, "b h l d -> b l (h d)"))
    assert relative_error(attention(x, num_steps), expected) < 1e-5


def _changed(block: DividedBlock, frame: int, patch: int) -> Tensor:
    """Which patches' outputs (F, P) a change of one patch's input moves."""
    tokens = seeded("tokens", (1, 1 + STEPS * 196, TINY.width)).double()
    moved = tokens.clone()
    moved[0, 1 + frame * 196 + patch] *= -1
    difference = (block(moved) - block(tokens)).abs().amax(dim=-1)
    assert difference[0, 0] > 1e-9  # CLS sees everything
    return rearrange(difference[0, 1:] > 1e-9, "(f p) -> f p", f=STEPS)


def _double_block() -> DividedBlock:
    """A block by the rule, in float64: one patch of 1568 moves far ones by little."""
    block = DividedBlock(TINY)
    fill_by_rule(block)
    return block.double()


def _silence(attention: DividedAttention) -> None:
    """Let an attention add nothing to its stream."""
    attention.proj.weight.zero_()
    attention.proj.bias.zero_()


@torch.no_grad()
@pytest.mark.parametrize("silent", ["time", "space"])
def test_in_one_block_a_patch_reaches_its_own_frame_through_space_and_its_own_place_through_time(silent: Axis) -> None:
    block = _double_block()
    reached = torch.zeros(STEPS, 196, dtype=torch.bool)
    if silent == "time":
        _silence(block.timeattn)
        reached[5] = True
    else:
        _silence(block.attn)
        reached[:, 77] = True
    assert torch.equal(_changed(block, frame=5, patch=77), reached)


@torch.no_grad()
def test_in_one_block_a_patch_reaches_another_frame_only_by_time_first_and_space_second() -> None:
    block = _double_block()
    # Through its own place to every frame, and from there to every patch of that frame.
    assert _changed(block, frame=5, patch=77).all()
    x = seeded("tokens", (1, 1 + STEPS * 196, TINY.width)).double()
    after_time = x + block.timeattn(block.norm3(x), STEPS)
    after_space = after_time + block.attn(block.norm1(after_time), STEPS)
    assert relative_error(block(x), after_space + block.mlp(block.norm2(after_space))) < 1e-12


@torch.no_grad()
def test_embedded_tokens_are_cls_then_frames_and_only_patches_know_the_time(
    network: Synchformer, segments: Tensor
) -> None:
    encoder = network.vfeat_extractor
    tokens = encoder.embed(segments[0])
    assert tokens.shape == (2, 1 + 8 * 196, TINY.width)
    assert torch.equal(tokens[0, 0], encoder.cls_token[0, 0] + encoder.pos_embed[0, 0])
    # The patch in row 3, column 9 of the sixth pair of frames, from its pixels.
    pixels = rearrange(segments[0, 1, 10:12, :, 48:64, 144:160], "t c h w -> c t h w")
    conv = encoder.patch_embed_3d.proj
    expected = F.linear(pixels.flatten(), conv.weight.flatten(1), conv.bias)
    expected = expected + encoder.pos_embed[0, 1 + 3 * 14 + 9] + encoder.temp_embed[0, 5]
    assert relative_error(tokens[1, 1 + 5 * 196 + 3 * 14 + 9], expected) < 1e-5


# --- segments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_frames", "num_segments"), [(16, 1), (23, 1), (24, 2), (100, 11), (200, 24)])
def test_segments_are_views_of_sixteen_frames_every_eight(num_frames: int, num_segments: int) -> None:
    frames = seeded("frames", (2, num_frames, 3, 4, 5))
    segments = segment_frames(frames)
    assert segments.shape == (2, num_segments, 16, 3, 4, 5)
    assert segments.untyped_storage().data_ptr() == frames.untyped_storage().data_ptr()
    for s in range(num_segments):
        assert torch.equal(segments[:, s], frames[:, 8 * s : 8 * s + 16])


def test_length_and_stride_of_segments_can_be_others() -> None:
    frames = torch.arange(10.0).reshape(1, 10, 1, 1, 1).expand(-1, -1, 3, 2, 2)
    segments = segment_frames(frames, length=4, stride=3)
    assert segments[0, :, :, 0, 0, 0].tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]


def test_a_clip_shorter_than_a_segment_is_refused(network: Synchformer) -> None:
    for cut in (segment_frames, network.encode_frames):
        with pytest.raises(ValueError, match="15 frames are fewer than the 16 of a segment"):
            cut(torch.zeros(1, 15, 3, 224, 224))


@torch.no_grad()
def test_segments_do_not_see_each_other(network: Synchformer, segments: Tensor) -> None:
    both = network(segments)
    for s in range(2):
        assert relative_error(network(segments[:, s : s + 1]), both[:, s : s + 1]) < FORWARD_TOLERANCE
    other = segments.clone()
    other[:, 0] = -other[:, 0]
    changed = network(other)
    assert relative_error(changed[:, 1], both[:, 1]) < FORWARD_TOLERANCE
    assert relative_rms(changed[:, 0], both[:, 0]) > 0.01
    # Two segments of a clip are what two clips of a segment are.
    as_clips = network(rearrange(segments, "1 s ... -> s 1 ..."))
    assert relative_error(rearrange(as_clips, "s 1 f d -> 1 s f d"), both) < FORWARD_TOLERANCE


@torch.no_grad()
def test_how_many_segments_are_encoded_at_once_changes_nothing(network: Synchformer, segments: Tensor) -> None:
    waves = rearrange(segments, "1 s t c h w -> 1 (s t) c h w")
    clips = torch.cat([waves, waves.flip(1)])[:, :31]  # two segments and seven frames that no segment takes
    expected = rearrange(network(segment_frames(clips)), "b s f d -> b (s f) d")
    assert expected.shape == (2, 2 * 8, TINY.width)
    assert relative_rms(expected[0], expected[1]) > 0.01
    for at_once in (1, 2, 8):
        assert relative_error(network.encode_frames(clips, at_once), expected) < FORWARD_TOLERANCE


def test_encoding_frames_sees_only_so_many_segments_at_once_and_keeps_no_graph(network: Synchformer) -> None:
    seen: list[int] = []
    hook = network.vfeat_extractor.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].shape[0]))
    features = network.encode_frames(torch.zeros(2, 32, 3, 224, 224, dtype=torch.float16), segments_at_once=2)
    hook.remove()
    assert seen == [2, 1, 2, 1]
    assert features.dtype == torch.float32
    assert not features.requires_grad
