"""The trunks against the published tables: parameter counts to the digit, output rates, strides and time padding."""

import pytest
import torch
from torch import Tensor, nn

from models.slowfast import FittedNorm, ReplicateTime, SlowFast, TrunkConfig, base_trunk, fitting, tiny_trunk


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def by_hand(config: TrunkConfig) -> dict[str, int]:
    """Parameters from the tables alone: convolutions without bias, two numbers a channel for every norm."""
    dims = config.space_dims

    def conv(i: int, o: int, time: int, space: int) -> int:
        return i * o * time * space**dims

    def block(i: int, o: int, time: int, project: bool) -> int:
        inner = o // 4 if config.block == "bottleneck" else o
        total = conv(i, inner, time, 1) + 2 * inner + conv(inner, inner, 1, 3) + 2 * inner
        if config.block == "bottleneck":
            total += conv(inner, o, 1, 1) + 2 * o
        return total + (conv(i, o, 1, 1) + 2 * o if project else 0)

    space = config.stem_space_kernel
    slow = conv(config.in_channels, config.slow_stem_width, 1, space) + 2 * config.slow_stem_width
    fast = conv(config.in_channels, config.fast_stem_width, config.fast_stem_kernel, space) + 2 * config.fast_stem_width
    lateral, slow_width, fast_width = 0, config.slow_stem_width, config.fast_stem_width
    for stage in config.stages:
        lateral += conv(fast_width, 2 * fast_width, config.lateral_kernel, 1) + 4 * fast_width
        slow += block(slow_width + 2 * fast_width, stage.slow_width, stage.slow_kernel, True)
        slow += (stage.num_blocks - 1) * block(stage.slow_width, stage.slow_width, stage.slow_kernel, False)
        fast += block(fast_width, stage.fast_width, stage.fast_kernel, True)
        fast += (stage.num_blocks - 1) * block(stage.fast_width, stage.fast_width, stage.fast_kernel, False)
        slow_width, fast_width = stage.slow_width, stage.fast_width
    if config.lateral_after_last:
        lateral += conv(fast_width, 2 * fast_width, config.lateral_kernel, 1) + 4 * fast_width
    return {"slow": slow, "fast": fast, "lateral": lateral}


@pytest.mark.parametrize(
    ("kind", "slow", "fast", "lateral"),
    [("video", 32_827_456, 514_152, 302_880), ("audio", 25_273_664, 390_664, 302_880)],
)
def test_the_base_trunks_have_the_published_numbers_of_parameters(kind, slow, fast, lateral) -> None:
    with torch.device("meta"):
        trunk = SlowFast(base_trunk(kind))
    counted = {
        "slow": count(trunk.slow_stem, trunk.slow_stages),
        "fast": count(trunk.fast_stem, trunk.fast_stages),
        "lateral": count(trunk.laterals),
    }
    assert counted == by_hand(base_trunk(kind)) == {"slow": slow, "fast": fast, "lateral": lateral}
    published = {"video": 33.64e6, "audio": 25.97e6}[kind]
    assert count(trunk) == pytest.approx(published, abs=0.005e6)


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_the_tiny_trunks_match_a_count_by_hand(kind) -> None:
    trunk = SlowFast(tiny_trunk(kind))
    assert count(trunk) == sum(by_hand(tiny_trunk(kind)).values()) == {"video": 169_784, "audio": 88_024}[kind]


def test_the_base_slow_stages_see_the_laterals_channels() -> None:
    with torch.device("meta"):
        trunk = SlowFast(base_trunk("video"))
    inputs = [stage[0].skip[0].in_channels for stage in trunk.slow_stages]
    assert inputs == [80, 320, 640, 1280]
    assert [len(stage) for stage in trunk.slow_stages] == [len(stage) for stage in trunk.fast_stages] == [3, 4, 6, 3]


@pytest.mark.parametrize("make", [base_trunk, tiny_trunk])
@pytest.mark.parametrize("steps", [64, 24, 10])
def test_video_never_strides_time(make, steps) -> None:
    config = make("video")
    with torch.device("meta"):
        slow, fast = SlowFast(config)(torch.empty(2, 3, steps, 64, 64))
    assert fast.shape[:3] == (2, config.fast_out, steps)
    assert slow.shape[:3] == (2, config.slow_out, -(-steps // 4))


@pytest.mark.parametrize("make", [base_trunk, tiny_trunk])
@pytest.mark.parametrize("columns", [256, 96, 90])
def test_audio_strides_time_by_four_in_both_streams(make, columns) -> None:
    config = make("audio")
    with torch.device("meta"):
        slow, fast = SlowFast(config)(torch.empty(2, 1, columns, 128))
    assert fast.shape[:3] == (2, config.fast_out, -(-columns // 4))
    assert slow.shape[:3] == (2, config.slow_out, -(-columns // 16))


def test_the_base_trunks_end_in_the_published_maps() -> None:
    with torch.device("meta"):
        slow, fast = SlowFast(base_trunk("video"))(torch.empty(1, 3, 32, 224, 224))
        slow_sound, fast_sound = SlowFast(base_trunk("audio"))(torch.empty(1, 1, 512, 128))
    assert (slow.shape, fast.shape) == ((1, 2048, 8, 7, 7), (1, 256, 32, 7, 7))
    assert (slow_sound.shape, fast_sound.shape) == ((1, 2048, 32, 4), (1, 256, 128, 4))


def test_time_is_padded_by_its_edges() -> None:
    x = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 1, 3, 1)
    assert ReplicateTime(2)(x).flatten().tolist() == [1, 1, 1, 2, 3, 3, 3]


@pytest.mark.parametrize(("kind", "shape"), [("video", (1, 3, 24, 32, 32)), ("audio", (1, 1, 96, 64))])
def test_a_still_input_looks_the_same_at_every_step(kind, shape) -> None:
    """The property that replicate padding is for: no step can be told from its distance to the border."""
    torch.manual_seed(0)
    trunk = randomised(SlowFast(tiny_trunk(kind)))
    still = torch.randn(shape)[:, :, :1].expand(shape)
    for stream in trunk(still):
        torch.testing.assert_close(stream, stream[:, :, :1].expand_as(stream), atol=1e-4, rtol=1e-4)


def test_the_slow_stream_reads_every_fourth_step_and_hears_of_the_others_through_the_laterals() -> None:
    torch.manual_seed(0)
    trunk = randomised(SlowFast(tiny_trunk("video")))
    x = torch.rand(1, 3, 24, 32, 32)
    between = x.clone()
    between[:, :, 10] += 1.0
    with torch.no_grad():
        assert not torch.equal(trunk(x)[0], trunk(between)[0])
        for lateral in trunk.laterals:
            lateral.conv[1].weight.zero_()
        assert torch.equal(trunk(x)[0], trunk(between)[0])
        on_grid = x.clone()
        on_grid[:, :, 12] += 1.0
        assert not torch.equal(trunk(x)[0], trunk(on_grid)[0])


def test_blocks_start_as_their_skip_connections() -> None:
    torch.manual_seed(0)
    block = SlowFast(tiny_trunk("video")).slow_stages[1][0]
    x = torch.rand(2, 40, 6, 8, 8)
    torch.testing.assert_close(block(x), torch.relu(block.skip(x)))


def test_fitting_makes_every_channel_standard_once_and_for_all() -> None:
    torch.manual_seed(0)
    norm = FittedNorm(4)
    x = torch.randn(8, 4, 5, 6) * torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1) + 7
    with fitting(norm):
        norm(x)
    fitted = norm(x)
    torch.testing.assert_close(fitted.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(fitted.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    one = norm(x[:1])
    torch.testing.assert_close(one, fitted[:1])
    assert {"mean", "variance"} <= norm.state_dict().keys()


def test_the_tiny_trunk_treats_clips_apart_in_training_too() -> None:
    torch.manual_seed(0)
    trunk = randomised(SlowFast(tiny_trunk("audio"))).train()
    x = torch.randn(4, 1, 96, 64)
    together, alone = trunk(x)[1][2:3], trunk(x[2:3])[1]
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def randomised(trunk: SlowFast) -> SlowFast:
    """Give the zero-initialised norms a weight, so that every path counts."""
    for module in trunk.modules():
        if isinstance(module, FittedNorm):
            assert isinstance(module.weight, Tensor)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return trunk
