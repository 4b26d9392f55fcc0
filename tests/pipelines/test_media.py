"""The reader on real files: time, picture, sound, and the reason given for every kind of broken file."""

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, resize

from pipelines.data import media
from pipelines.data.contracts import REJECT_REASONS
from pipelines.data.media_mix import mono_weights
from pipelines.data.media_scale import SCALING
from pipelines.data.window import DecodedWindow, FrameGrid, WindowRequest
from pipelines.errors import MediaError
from tests.pipelines.clip_factory import beep, grey_frames, tone, write_clip

MAX_PIXELS = 1 << 22
FINE = FrameGrid(rate_hz=200, size_px=8, fit="stretch", num_frames=400)


def ask(
    path: Path,
    *grids: FrameGrid,
    start_s: float = 0.0,
    duration_s: float = 2.0,
    rate_hz: int = 16_000,
    sound: bool = True,
) -> DecodedWindow:
    request = WindowRequest(
        start_s=start_s,
        duration_s=duration_s,
        grids=grids,
        audio_rate_hz=rate_hz,
        audio_samples=round(duration_s * rate_hz) if sound else 0,
        max_pixels=MAX_PIXELS,
    )
    with path.open("rb") as file:
        return media.read_window(file, request)


def reason_of(path: Path, *grids: FrameGrid, **options: float) -> str:
    with pytest.raises(MediaError) as caught:
        ask(path, *(grids or (FINE,)), **options)  # pyright: ignore[reportArgumentType]
    assert caught.value.reason in REJECT_REASONS
    return caught.value.reason


def onset_s(window: DecodedWindow) -> float:
    assert window.audio is not None
    return float(np.argmax(np.abs(window.audio) > 0.1) - window.audio_margin) / window.audio_rate_hz


def flash_s(window: DecodedWindow, grid: FrameGrid) -> float:
    return float(np.argmax(window.frames[0].mean(axis=(1, 2, 3)) > 128)) / grid.rate_hz


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain.mp4", {}),
        ("b_frames.mp4", {"b_frames": 2}),
        ("late.mp4", {"b_frames": 2, "offset_s": 0.7}),
        ("b_frames.mkv", {"b_frames": 2, "rate_hz": 44_100}),
        ("late.mkv", {"offset_s": 1.3, "audio_codec": "libopus"}),
        ("vp9.webm", {"video_codec": "libvpx-vp9", "audio_codec": "libopus"}),
        ("xvid.avi", {"video_codec": "mpeg4", "audio_codec": "libmp3lame"}),
        ("b_frames.avi", {"b_frames": 2, "audio_codec": "pcm_s16le"}),
    ],
)
def test_flash_and_beep_stay_within_20_ms_of_each_other(tmp_path: Path, name: str, options: dict) -> None:
    rate_hz = options.get("rate_hz", 48_000)
    levels = [255 if 50 <= i < 55 else 20 for i in range(125)]
    path = write_clip(tmp_path / name, grey_frames(levels), beep(2.5, rate_hz, 1.0), frame_rate=50, **options)
    window = ask(path, FINE)
    assert abs(flash_s(window, FINE) - onset_s(window)) < 0.020
    # t = 0 is the file's own start, which priming samples may put a little before the first frame.
    assert flash_s(window, FINE) == pytest.approx(1.0, abs=0.035)


@pytest.mark.parametrize("start_s", [0.5, 3.2, 5.5])
def test_a_window_deep_in_a_file_is_the_same_place_whether_it_is_sought_or_not(tmp_path: Path, start_s: float) -> None:
    flash = [255 if i == 100 or i == 190 else 20 for i in range(200)]
    wave = beep(8.0, 44_100, 4.0) + beep(8.0, 44_100, 7.6)
    path = write_clip(
        tmp_path / "long.mp4", grey_frames(flash), wave, rate_hz=44_100, frame_rate=25, b_frames=2, group=50
    )
    window = ask(path, FINE, start_s=start_s, duration_s=2.0)
    expected_s = {0.5: None, 3.2: 0.8, 5.5: 2.1}[start_s]
    if expected_s is None or expected_s >= 2.0:
        assert window.frames[0].max() < 128
    else:
        assert flash_s(window, FINE) == pytest.approx(expected_s, abs=0.006)
        assert onset_s(window) == pytest.approx(expected_s, abs=0.006)


def test_a_variable_frame_rate_shows_the_latest_frame_that_is_due(tmp_path: Path) -> None:
    times = [0.0, 0.05, 0.4, 0.42, 0.9, 1.0, 1.7, 1.75]
    levels = [20, 50, 80, 110, 140, 170, 200, 230]
    path = write_clip(tmp_path / "vfr.mp4", grey_frames(levels), tone(2.0, 48_000), frame_times_s=times)
    grid = FrameGrid(rate_hz=16, size_px=8, fit="stretch", num_frames=32)
    with path.open("rb") as file:
        request = WindowRequest(
            start_s=0,
            duration_s=2.0,
            grids=(grid,),
            audio_rate_hz=16_000,
            audio_samples=32_000,
            max_pixels=MAX_PIXELS,
            max_missing=0.2,
        )
        shown = media.read_window(file, request).frames[0].mean(axis=(1, 2, 3))
    expected = [levels[max(i for i, t in enumerate(times) if t <= k / 16)] for k in range(32)]
    np.testing.assert_allclose(shown, expected, atol=6)


@pytest.mark.parametrize(("rotation", "corner"), [(0, (0, 0)), (90, (1, 0)), (180, (1, 1)), (-90, (0, 1))])
def test_a_rotated_picture_is_shown_upright(tmp_path: Path, rotation: int, corner: tuple[int, int]) -> None:
    picture = np.full((48, 64, 3), 20, np.uint8)
    picture[:24, :32] = 240
    path = write_clip(tmp_path / "turned.mp4", [picture] * 50, tone(2.0, 48_000), rotation=rotation)
    for fit in ("stretch", "cover"):
        frame = ask(path, FrameGrid(rate_hz=1, size_px=16, fit=fit, num_frames=2)).frames[0][0].mean(axis=2)
        bright = frame.reshape(2, 8, 2, 8).mean(axis=(1, 3))
        assert np.unravel_index(bright.argmax(), (2, 2)) == corner


def test_cover_crops_the_middle_and_stretch_keeps_the_whole_picture(tmp_path: Path) -> None:
    picture = np.full((40, 120, 3), 20, np.uint8)
    picture[:, 40:80] = 240
    path = write_clip(tmp_path / "wide.mp4", [picture] * 50, tone(2.0, 48_000))
    cover = FrameGrid(rate_hz=1, size_px=24, fit="cover", num_frames=2)
    stretch = FrameGrid(rate_hz=1, size_px=24, fit="stretch", num_frames=2)
    covered, stretched = (frames[0].mean(axis=(0, 2)) for frames in ask(path, cover, stretch).frames)
    assert covered[2:-2].min() > 200
    assert stretched[2:6].max() < 60
    assert stretched[11:13].min() > 200
    assert stretched[-6:-2].max() < 60


@pytest.mark.parametrize(("height", "width"), [(54, 96), (54, 62), (98, 54), (40, 40)])
def test_the_antialiased_scaler_and_crop_are_those_of_torchvision(tmp_path: Path, height: int, width: int) -> None:
    """The public encoders were trained behind torchvision's bicubic resize of RGB and its centre crop."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // 2, width // 2, 3)).astype(np.uint8)
    path = write_clip(tmp_path / "blocks.mp4", [coarse.repeat(2, 0).repeat(2, 1)] * 50, tone(2.0, 48_000))
    grids = [FrameGrid(rate_hz=1, size_px=24, fit=f, num_frames=2, scaler="antialiased") for f in ("stretch", "cover")]
    stretched, covered = (torch.from_numpy(frames[0]) for frames in ask(path, *grids).frames)
    with av.open(str(path)) as container:
        rgb = next(container.decode(video=0)).reformat(format="rgb24", interpolation=SCALING).to_ndarray()
    whole = torch.from_numpy(rgb).permute(2, 0, 1)
    bicubic = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
    expected = resize(whole, [24, 24], **bicubic).permute(1, 2, 0)
    # On noise the two libraries' integer weights round apart, by a few levels of 255 at most.
    assert (stretched.int() - expected.int()).abs().max() <= 6
    assert (stretched.int() - expected.int()).abs().float().mean() < 0.5
    expected = center_crop(resize(whole, [24], **bicubic), [24, 24]).permute(1, 2, 0)
    assert (covered.int() - expected.int()).abs().max() <= 6
    assert (covered.int() - expected.int()).abs().float().mean() < 0.5


@pytest.mark.parametrize(("height", "width"), [(35, 21), (1, 1), (17, 301)])
def test_odd_sizes_are_read(tmp_path: Path, height: int, width: int) -> None:
    path = write_clip(
        tmp_path / "odd.mkv",
        grey_frames([100] * 50, height, width),
        tone(2.0, 48_000),
        video_codec="libvpx-vp9",
        audio_codec="libopus",
    )
    for fit in ("cover", "stretch"):
        frames = ask(path, FrameGrid(rate_hz=16, size_px=32, fit=fit, num_frames=32)).frames[0]
        assert frames.shape == (32, 32, 32, 3)
        assert abs(float(frames.mean()) - 100) < 6


@pytest.mark.parametrize("rate_hz", [8000, 11_025, 16_000, 44_100, 48_000, 96_000, 192_000])
def test_fault_07_any_rate_of_sound_fills_the_window_exactly(tmp_path: Path, rate_hz: int) -> None:
    path = write_clip(tmp_path / "tone.mov", None, tone(2.5, rate_hz, 440.0), rate_hz=rate_hz, audio_codec="pcm_s16le")
    window = ask(path)
    assert window.audio is not None
    assert window.audio_rate_hz == rate_hz
    assert len(window.audio) == 2 * rate_hz + 2 * window.audio_margin
    inside = window.audio[window.audio_margin : -window.audio_margin]
    np.testing.assert_allclose(inside, tone(2.0, rate_hz, 440.0)[0], atol=1e-4)
    assert (window.audio_margin * 16_000) % rate_hz == 0


def test_an_unusual_rate_is_brought_to_48_khz(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "odd.mkv", None, tone(2.5, 22_051, 440.0), rate_hz=22_051, audio_codec="pcm_s16le")
    window = ask(path)
    assert window.audio is not None
    assert window.audio_rate_hz == 48_000
    inside = window.audio[window.audio_margin : -window.audio_margin]
    np.testing.assert_allclose(inside[500:-500], tone(2.0, 48_000, 440.0)[0][500:-500], atol=5e-3)


SURROUND = {
    "mono": [1.0],
    "stereo": [0.5, 0.5],
    "5.1": [0.2071, 0.2071, 0.2929, 0.0, 0.1464, 0.1464],
    "7.1": [0.1602, 0.1602, 0.2265, 0.0, 0.1133, 0.1133, 0.1133, 0.1133],
}
"""Weights of ITU-R BS.775 folded to mono, scaled to sum 1: L, R, C, LFE, surrounds."""


@pytest.mark.parametrize("codec", ["flac", "aac", "pcm_s24le"])
@pytest.mark.parametrize("layout", list(SURROUND))
def test_fault_07_channels_are_mixed_by_what_they_are(tmp_path: Path, layout: str, codec: str) -> None:
    weights = np.array(SURROUND[layout])
    channels = len(weights)
    gains = np.arange(1, channels + 1, dtype=np.float32)[:, None] / channels
    wave = gains * tone(2.5, 48_000, 440.0)
    path = write_clip(
        tmp_path / ("many.mp4" if codec == "aac" else "many.mkv"), None, wave, layout=layout, audio_codec=codec
    )
    window = ask(path)
    assert window.audio is not None
    inside = window.audio[window.audio_margin : -window.audio_margin]
    assert len(inside) == 2 * 48_000
    expected = float(weights @ gains[:, 0]) * tone(2.0, 48_000, 440.0)[0]
    # AAC adds noise of its own; what it must not do is change the gain or the place.
    gain = float(inside @ expected / (expected @ expected))
    assert gain == pytest.approx(1.0, abs=0.05 if codec == "aac" else 0.002)
    assert np.abs(inside - gain * expected).mean() < (0.02 if codec == "aac" else 0.001)


def test_a_channel_of_bass_effects_alone_and_unplaced_channels_are_not_lost() -> None:
    for name, expected in (
        ("2.1", [0.5, 0.5, 0.0]),
        ("quad", [0.2929, 0.2929, 0.2071, 0.2071]),
        ("22.2", [1 / 24] * 24),
    ):
        np.testing.assert_allclose(mono_weights(av.AudioLayout(name)), expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(64, 96), (360, 640)])
def test_the_fast_scaler_is_within_35_db_of_an_antialiased_one(tmp_path: Path, shape: tuple[int, int]) -> None:
    height, width = shape
    y, x = np.mgrid[:height, :width] / height
    waves = [127 + 60 * np.sin(9 * x + 4 * y), 127 + 60 * np.sin(5 * y * x), 127 + 60 * np.cos(12 * y)]
    path = write_clip(tmp_path / "waves.mp4", [np.stack(waves, axis=2).astype(np.uint8)] * 50, tone(2.0, 48_000))
    grids = [FrameGrid(rate_hz=1, size_px=64, fit="stretch", num_frames=2, scaler=s) for s in ("fast", "antialiased")]
    fast, antialiased = (frames[0].astype(float) for frames in ask(path, *grids).frames)
    assert 20 * np.log10(255 / np.sqrt(((fast - antialiased) ** 2).mean())) > 35


@pytest.mark.parametrize("transfer", [1, 16, 18])
def test_fault_10_ten_bits_and_hdr_give_a_picture_in_its_order_of_brightness(tmp_path: Path, transfer: int) -> None:
    steps = np.repeat(np.linspace(20, 235, 8).astype(np.uint8), 12)
    picture = np.broadcast_to(steps[None, :, None], (64, 96, 3)).copy()
    path = tmp_path / "hdr.mp4"
    with av.open(str(path), "w") as out:
        params = f"log-level=none:colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc"
        stream = out.add_stream("libx265", rate=25, options={"x265-params": params})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p10le"
        for _ in range(50):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    shown = ask(path, FrameGrid(rate_hz=1, size_px=32, fit="stretch", num_frames=2), sound=False).frames[0]
    levels = shown[0].reshape(32, 8, 4, 3)[:, :, 1:3].mean(axis=(0, 2, 3))
    assert (np.diff(levels) > 10).all()
    assert levels[-1] - levels[0] > 120


def test_fault_10_a_picture_with_alpha_is_read(tmp_path: Path) -> None:
    path = write_clip(
        tmp_path / "alpha.webm",
        grey_frames([120] * 50),
        tone(2.0, 48_000),
        video_codec="libvpx-vp9",
        audio_codec="libopus",
        pixel_format="yuva420p",
    )
    frames = ask(path, FrameGrid(rate_hz=4, size_px=16, fit="stretch", num_frames=8)).frames[0]
    assert abs(float(frames.mean()) - 120) < 6


def test_a_little_missing_at_the_end_is_padded_and_told(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "short.mov", grey_frames([50] * 48), tone(1.94, 48_000), audio_codec="pcm_s16le")
    window = ask(path, FrameGrid(rate_hz=25, size_px=8, fit="stretch", num_frames=50))
    assert window.valid_s == pytest.approx(1.92, abs=0.01)
    assert abs(float(window.frames[0][-1].mean()) - 50) < 6
    assert window.audio is not None
    assert not window.audio[-window.audio_margin - 100 :].any()


@pytest.mark.parametrize(("picture_s", "sound_s", "start_s"), [(1.8, 2.5, 0), (2.5, 1.8, 0), (2.5, 2.5, 1), (2, 2, 9)])
def test_more_missing_is_too_short(tmp_path: Path, picture_s: float, sound_s: float, start_s: float) -> None:
    path = write_clip(
        tmp_path / "short.mp4", grey_frames([50] * round(picture_s * 25)), tone(sound_s, 48_000), frame_rate=25
    )
    assert reason_of(path, start_s=start_s) == "too_short"


def test_a_hole_in_the_sound_is_silence_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "hole.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for start in (0, 16_800):
            block = av.AudioFrame.from_ndarray(np.full((1, 16_000), 8000, np.int16), format="s16", layout="mono")
            block.sample_rate, block.pts = 16_000, start
            container.mux(stream.encode(block))
        container.mux(stream.encode(None))
    window = ask(path)
    assert window.audio is not None
    inside = np.abs(window.audio[window.audio_margin : -window.audio_margin]) > 0.1
    assert inside[:15_900].all()
    assert not inside[16_100:16_700].any()
    assert inside[16_900:].all()
    assert window.valid_s == pytest.approx(1.95, abs=0.01)


def mp4(folder: Path, **options: object) -> Path:
    return write_clip(folder / "good.mp4", grey_frames([60] * 63), tone(2.5, 48_000), **options)  # pyright: ignore[reportArgumentType]


def test_files_that_are_no_media_are_told_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, content, reason in (
        ("zero.mp4", b"", "empty"),
        ("random.mp4", rng.bytes(5000), "not_media"),
        ("text.mp4", b"this is a text, renamed\n" * 50, "not_media"),
        ("playlist.mp4", b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile:///etc/passwd\n", "not_media"),
        ("concat.mp4", b"ffconcat version 1.0\nfile /etc/passwd\n", "not_media"),
        ("picture.mp4", b"\x89PNG\r\n\x1a\n" + rng.bytes(500), "no_video"),
        ("header.mp4", b"\x00\x00\x00\x20ftypisom" + rng.bytes(400), "truncated"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        assert reason_of(path) == reason, name


@pytest.mark.parametrize("faststart", [True, False])
@pytest.mark.parametrize("share", [0.002, 0.01, 0.016, 0.3, 0.5, 0.8])
def test_a_cut_off_file_is_truncated(tmp_path: Path, faststart: bool, share: float) -> None:
    content = mp4(tmp_path, faststart=faststart).read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(content[: max(int(len(content) * share), 40)])
    assert reason_of(path) == "truncated"


def test_a_damaged_picture_is_never_shown(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    noise = [rng.integers(0, 255, (64, 64, 3), np.uint8) for _ in range(50)]
    path = write_clip(tmp_path / "noise.mp4", noise, tone(2.0, 48_000), faststart=True)
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + len(content) // 3
    content[start : start + 4000] = bytes(4000)
    path.write_bytes(bytes(content))
    assert reason_of(path) == "truncated"


def test_missing_tracks_and_foreign_codecs_have_their_reasons(tmp_path: Path) -> None:
    silent_film = write_clip(tmp_path / "film.mp4", grey_frames([60] * 63), None)
    assert reason_of(silent_film) == "no_audio"
    assert ask(silent_film, FINE, sound=False).audio is None
    radio = write_clip(tmp_path / "radio.wav", None, tone(2.5, 48_000), audio_codec="pcm_s16le")
    assert reason_of(radio) == "no_video"
    assert ask(radio).audio is not None
    foreign = write_clip(
        tmp_path / "foreign.avi",
        grey_frames([60] * 63),
        tone(2.5, 48_000),
        video_codec="mjpeg",
        audio_codec="pcm_s16le",
        pixel_format="yuvj420p",
    )
    assert reason_of(foreign) == "unsupported_codec"


def test_a_picture_larger_than_the_budget_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    huge = write_clip(tmp_path / "huge.mp4", grey_frames([60] * 3, 2200, 2200), tone(2.5, 48_000))
    assert reason_of(huge) == "too_large"
    elongated = write_clip(tmp_path / "long.mp4", grey_frames([60] * 63, 16, 8000), tone(2.5, 48_000))
    assert reason_of(elongated, FrameGrid(rate_hz=4, size_px=224, fit="cover", num_frames=8)) == "too_large"


def test_sound_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    wave = tone(2.5, 48_000)
    wave[0, 30_000] = np.nan
    path = write_clip(tmp_path / "nan.mov", None, wave, audio_codec="pcm_f32le")
    assert reason_of(path, FINE) == "no_video"
    with pytest.raises(MediaError) as caught:
        ask(path)
    assert caught.value.reason == "nonfinite"


def test_the_container_tells_its_length_without_decoding(tmp_path: Path) -> None:
    with mp4(tmp_path).open("rb") as file:
        info = media.probe(file, MAX_PIXELS)
    assert info.duration_s == pytest.approx(2.5, abs=0.05)
    assert (info.has_video, info.has_audio, info.width, info.height) == (True, True, 48, 32)


def test_the_reader_needs_neither_torch_nor_arrow() -> None:
    code = "import sys, pipelines.data.media; print({'torch', 'pyarrow', 'ray', 'scipy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
