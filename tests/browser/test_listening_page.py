"""The listening page in a real browser: every video loads, one plays, the picture of it is worth looking at."""

import http.server
import os
import queue
import re
import shutil
import signal
import subprocess
import threading
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data.units import HERE
from pipelines.evaluation.evaluate import EvaluationInputs, evaluate
from pipelines.evaluation.listening_page import CONTENT_POLICY
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
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)
PLAY = """<script>
const tell = (text) => fetch('/tell?' + text);
videos[1].addEventListener('timeupdate', () => {
  // Tells nothing while both play: the other one has to be stopped.
  if (videos[1].currentTime > 0 && videos[0].paused)
    tell('first=' + videos[0].currentTime + '&second=' + videos[1].currentTime);
});
const click = () => {
  if (videos[0].currentTime === 0) return;
  videos[0].removeEventListener('timeupdate', click);
  cards[1].querySelector('.timeline').click();
};
videos[0].addEventListener('timeupdate', click);
videos[0].play().catch((error) => tell('error=' + encodeURIComponent(error)));
</script></body>"""
PLAY_LIMIT_S = 90.0


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


def command(profile: Path, *arguments: str) -> list[str]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine")
    return [program, *FLAGS, f"--user-data-dir={profile}", *arguments]


def chromium(profile: Path, *arguments: str) -> str:
    environment = {**os.environ, "HOME": str(profile)}
    words = command(profile, *arguments)
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=True, env=environment).stdout


class PageServer(http.server.ThreadingHTTPServer):
    """Gives one page to a browser on this machine, and takes the first thing that its script tells."""

    def __init__(self, page: str) -> None:
        told: queue.Queue[dict[str, list[str]]] = queue.Queue()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urllib.parse.urlsplit(self.path)
                if url.path == "/tell":
                    told.put(urllib.parse.parse_qs(url.query))
                content = page.encode() if url.path == "/" else b""
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        super().__init__(("127.0.0.1", 0), Handler)
        self.told = told


def test_every_video_loads_and_none_is_broken(page: Path, tmp_path: Path) -> None:
    dom = chromium(tmp_path, "--virtual-time-budget=10000", "--dump-dom", page.as_uri())
    assert re.search(r'<body[^>]*data-ready="6"', dom)
    assert re.search(r'<body[^>]*data-broken="0"', dom)


def test_a_click_on_a_spectrogram_plays_that_sound_and_stops_the_other(page: Path, tmp_path: Path) -> None:
    # The page may connect to nothing; here it may tell its own server how the playing goes.
    policy = CONTENT_POLICY.replace("default-src 'none'", "default-src 'none'; connect-src 'self'")
    content = page.read_text().replace("</body>", PLAY).replace(CONTENT_POLICY, policy)
    with PageServer(content) as server:
        # In real time: a video does not play on Chromium's virtual clock.
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        words = command(tmp_path / "profile", "--remote-debugging-port=0", url)
        # After what may skip: a server whose socket is closed under it takes a whole core for ever.
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            told = server.told.get(timeout=PLAY_LIMIT_S)
        finally:
            os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
            server.shutdown()
    # A click without a place in it is one at the left edge.
    assert 0 < float(told["second"][0]) <= 2.6, told
    assert float(told["first"][0]) > 0, told


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
