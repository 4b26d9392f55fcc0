import open_clip
import pytest
import torch
import torch.nn.functional as F

from models.clip import CLIP_VIT_H_14, PIXEL_MEAN, PIXEL_STD, TOKENIZER, CLIPConfig, FrozenCLIP, tokenize
from models.weights import build_loaded

SMALL = CLIPConfig(
    embed_dim=24,
    image_px=30,
    patch_px=7,
    image_width=32,
    image_depth=2,
    image_head_width=16,
    text_width=32,
    text_depth=2,
    text_heads=2,
)


@pytest.fixture(scope="module")
def clip() -> FrozenCLIP:
    torch.manual_seed(0)
    return FrozenCLIP(SMALL).eval()


def test_the_full_size_has_the_names_and_shapes_of_open_clips_own_model() -> None:
    with torch.device("meta"):
        ours = FrozenCLIP(CLIP_VIT_H_14).state_dict()
        theirs = open_clip.create_model(TOKENIZER, pretrained=None, device="meta").state_dict()
    assert {name: tuple(value.shape) for name, value in ours.items()} == {
        name: tuple(value.shape) for name, value in theirs.items()
    }
    assert sum(value.numel() for value in ours.values()) == 986_714_881


def test_the_pooled_projected_states_are_the_text_embedding_of_open_clip(clip: FrozenCLIP) -> None:
    """Its own `encode_text` pools at the end token and projects; ours stops before and normalises each token."""
    with torch.no_grad():
        clip.ln_final.bias.uniform_(-0.1, 0.1)
        oracle = open_clip.model.CLIP(
            embed_dim=24,
            vision_cfg={"image_size": 30, "layers": 2, "width": 32, "head_width": 16, "patch_size": 7},
            text_cfg={"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
            quick_gelu=True,
        )
        oracle.load_state_dict(clip.state_dict())
        captions = ["a dog barks", "rain falls on a tin roof while a train passes"]
        tokens = tokenize(captions)
        states = clip.text_states(captions)
        ends = states[torch.arange(2), tokens.argmax(dim=1)]
        expected = oracle.eval().encode_text(tokens, normalize=True)
        projected = F.normalize(ends @ clip.text_projection, dim=-1)
    torch.testing.assert_close(projected, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states.norm(dim=-1), torch.ones(2, 77))


def test_image_embeddings_are_those_of_open_clip_on_normalised_pixels(clip: FrozenCLIP) -> None:
    pixels = torch.rand(3, 3, 30, 30, generator=torch.Generator().manual_seed(1))
    normalised = (pixels - torch.tensor(PIXEL_MEAN)[:, None, None]) / torch.tensor(PIXEL_STD)[:, None, None]
    with torch.no_grad():
        expected = clip.encode_image(normalised, normalize=True)
    torch.testing.assert_close(clip.image_embeddings(pixels), expected)
    torch.testing.assert_close(expected.norm(dim=-1), torch.ones(3))


def test_pixels_beyond_the_last_whole_patch_are_not_seen_and_another_grid_is_refused(clip: FrozenCLIP) -> None:
    pixels = torch.rand(1, 3, 34, 34, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(clip.image_embeddings(pixels), clip.image_embeddings(pixels[..., :28, :28]))
    with pytest.raises(AssertionError, match=r"\(5, 5\) patches"):
        clip.image_embeddings(torch.rand(1, 3, 35, 35))


def test_a_word_piece_sees_what_is_before_it_and_not_what_comes_after(clip: FrozenCLIP) -> None:
    one, other = clip.text_states(["a dog barks loudly", "a dog barks softly"])
    start_a_dog_bar_ks = 5
    torch.testing.assert_close(one[:start_a_dog_bar_ks], other[:start_a_dog_bar_ks])
    assert (one[start_a_dog_bar_ks] - other[start_a_dog_bar_ks]).abs().max() > 0.01


def test_tokens_begin_end_and_are_padded_and_cut_to_77() -> None:
    empty, long = tokenize(["", "word " * 200])
    assert empty[:3].tolist() == [49406, 49407, 0]
    assert not empty[3:].any()
    assert (int(long[0]), int(long[-1])) == (49406, 49407)
    assert tokenize(["A DOG"]).equal(tokenize(["a dog"]))


def test_bfloat16_keeps_embeddings_within_two_degrees(clip: FrozenCLIP) -> None:
    rounded = FrozenCLIP(SMALL).eval()
    rounded.load_state_dict(clip.state_dict())
    rounded.to(torch.bfloat16)
    pixels = torch.rand(2, 3, 30, 30, generator=torch.Generator().manual_seed(1))
    text = rounded.text_states(["a dog barks"])
    assert text.dtype == torch.float32
    assert (text * clip.text_states(["a dog barks"])).sum(-1).min() > 0.9994
    assert (rounded.image_embeddings(pixels) * clip.image_embeddings(pixels)).sum(-1).min() > 0.9994


def test_loading_copies_nothing_and_leaves_no_weight_without_a_value(clip: FrozenCLIP) -> None:
    state = clip.state_dict()
    loaded = build_loaded(lambda: FrozenCLIP(SMALL), state, "memory")
    assert loaded.ln_final.weight.data_ptr() == state["ln_final.weight"].data_ptr()
    assert not any(value.is_meta for value in [*loaded.parameters(), *loaded.buffers()])
    torch.testing.assert_close(loaded.eval().text_states(["rain"]), clip.text_states(["rain"]))
    with pytest.raises(ValueError, match=r"memory do not fit FrozenCLIP: 1 missing: logit_scale"):
        build_loaded(lambda: FrozenCLIP(SMALL), {k: v for k, v in state.items() if k != "logit_scale"}, "memory")
