"""The listening page in a real browser: every video loads, one plays, the picture of it is worth looking at."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data.units import HERE
from pipelines.evaluation.evaluate import EvaluationInputs, evaluate
from pipelines.evaluation.report import ReportSettings, write_report
from pipelines.evaluation.subjects import EvaluationSettings, Subject
from pipelines.preferences.candidates import Sampling
from tests.demo_factory import write_demo_features, write_untrained_policy, write_untrained_reward

pytestmark = pytest.mark.browser
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1400,2300",
    "--autoplay-policy=no-user-gesture-required",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
PLAY = """<script>
videos[1].addEventListener('timeupdate', () => { document.body.dataset.played = videos[1].currentTime; });
videos[0].play().then(() => setTimeout(() => cards[1].querySelector('.timeline').click(), 300));
videos[0].addEventListener('pause', () => { document.body.dataset.firstPaused = 'yes'; });
</script></body>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    inputs = EvaluationInputs(
        features=str(write_demo_features(root / "features", {"test": 4})),
        reward=str(write_untrained_reward(root / "reward")),
        policy=str(write_untrained_policy(root / "policy")),
    )
    subjects: tuple[Subject, ...] = ("policy", "inverted")
    for subject in subjects:
        evaluate(
            inputs,
            EvaluationSettings(
                subject=subject,
                split="test",
                seed=0,
                num_candidates=1,
                sampling=Sampling(num_steps=2, guidance=1.0),
                max_clips=None,
            ),
            out=str(root / "scores" / subject),
            pool=HERE,
            say=lambda line: None,
        )
    write_report(
        inputs.features,
        [str(root / "scores" / subject) for subject in subjects],
        ReportSettings(labels=("M_0", "inverted"), num_clips=2, clip_ids=(), num_resamples=50, title="Listening page"),
        out=str(root / "report"),
        say=lambda line: None,
    )
    return root / "report" / "index.html"


def chromium(profile: Path, *arguments: str) -> str:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine")
    command = [program, *FLAGS, f"--user-data-dir={profile}", *arguments]
    environment = {**os.environ, "HOME": str(profile)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment).stdout


def test_every_video_loads_and_none_is_broken(page: Path, tmp_path: Path) -> None:
    dom = chromium(tmp_path, "--virtual-time-budget=10000", "--dump-dom", page.as_uri())
    assert re.search(r'<body[^>]*data-ready="6"', dom)
    assert re.search(r'<body[^>]*data-broken="0"', dom)


def test_a_click_on_a_spectrogram_plays_that_sound_and_stops_the_other(page: Path, tmp_path: Path) -> None:
    playing = tmp_path / "playing.html"
    playing.write_text(page.read_text().replace("</body>", PLAY))
    dom = chromium(tmp_path / "profile", "--virtual-time-budget=20000", "--dump-dom", playing.as_uri())
    played = re.search(r'data-played="([\d.]+)"', dom)
    assert played is not None
    # A click without a place in it is one at the left edge.
    assert 0 < float(played.group(1)) <= 2.6
    assert 'data-first-paused="yes"' in dom


def test_the_screenshot_shows_table_plots_pictures_and_spectrograms(page: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    chromium(tmp_path / "profile", "--virtual-time-budget=10000", f"--screenshot={picture}", page.as_uri())
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape == (2300, 1400, 3)
    # The spectrograms' dark violet and the found events' green are on the page, and most of it is light.
    violet = (pixels[..., 2] > pixels[..., 1] + 30) & (pixels[..., 0] > pixels[..., 1] + 20) & (pixels.sum(-1) < 350)
    green = np.abs(pixels - [0x17, 0xA6, 0x73]).sum(axis=-1) < 12
    assert violet.sum() > 4_000
    assert green.sum() > 500
    assert (pixels.sum(axis=-1) > 700).mean() > 0.4
