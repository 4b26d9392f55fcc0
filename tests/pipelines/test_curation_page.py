"""The page of measures escapes what came from outside, names files that are there, and shows the right ends."""

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.spec import SPECS
from pipelines.curation.page import CurationPage, Example, Section, Spread, shown
from pipelines.curation.report import PAGE, ReportSettings, contact_sheet, write_report
from pipelines.data.contracts import FEATURES, MEASURES
from pipelines.data.demo_world import render_clip
from pipelines.data.measured import MEASURED
from pipelines.data.storage import open_folder
from pipelines.data.store import Dataset
from pipelines.data.tables import table_from_rows
from pipelines.errors import InputError
from tests.feature_factory import write_dataset
from tests.world_factory import world_row

TINY = SPECS["tiny"]
EVIL = "<script>alert('x')</script>\" onerror=\"y"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs


def parsed(text: str) -> Tags:
    tags = Tags()
    tags.feed(text)
    return tags


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips with hostile ids and captions; the loudness of clip k is -k, one is not known, most are not clipped."""
    folder = tmp_path_factory.mktemp("page")
    ids = [f"{EVIL} {index}" for index in range(6)]
    clips = []
    for index, clip_id in enumerate(ids):
        row = world_row(render_clip(7, index), clip_id, "train")
        clips.append({**row, "caption": EVIL, **({"frames": [b"broken"]} if index == 4 else {})})
    measured = {
        **{name: None for name, _, _ in MEASURED},
        **dict.fromkeys(("semantic", "temporal", "reward", "offset_s", "reward_invalid")),
    }
    rows = [
        {
            **measured,
            "clip_id": clip_id,
            "split": "train",
            "valid_s": 2.5,
            "loudness_lufs": None if index == 5 else -float(index),
            "clipped_share": 0.25 if index == 3 else 0.0,
        }
        for index, clip_id in enumerate(ids)
    ]
    write_dataset(folder / "f", FEATURES, {"a": table_from_rows(clips, FEATURES, TINY)}, {})
    write_dataset(folder / "m", MEASURES, {"a": table_from_rows(rows, MEASURES, TINY)}, {})
    return folder


def report(world: Path, out: Path) -> tuple[str, list[str]]:
    names = write_report(
        open_folder(str(out)),
        Dataset.open(str(world / "f"), FEATURES),
        Dataset.open(str(world / "m"), MEASURES),
        ReportSettings(num_examples=2),
        lineage={EVIL: EVIL},
    )
    return (out / PAGE).read_text(), names


def test_nothing_from_outside_becomes_a_tag_or_an_attribute(world: Path, tmp_path: Path) -> None:
    text, _ = report(world, tmp_path)
    tags = parsed(text)
    assert "script" not in tags.names
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    assert text.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;") >= 6
    assert "default-src 'none'" in text


def test_every_file_that_the_page_names_is_there_and_the_other_way_round(world: Path, tmp_path: Path) -> None:
    text, names = report(world, tmp_path)
    sources = {f"report/{value}" for name, value in parsed(text).attributes if name == "src"}
    assert sources | {PAGE} == set(names)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(names)
    assert all(re.fullmatch(r"report/media/[0-9a-f]{16}\.(jpg|png|flac)", name) for name in names if name != PAGE)
    anchors = {value for name, value in parsed(text).attributes if name == "href"}
    assert anchors == {"#loudness_lufs", "#clipped_share"}
    assert all(f'id="{anchor[1:]}"' in text for anchor in anchors if anchor)


def test_the_ends_are_the_extreme_clips_and_an_end_that_most_share_is_not_shown(world: Path, tmp_path: Path) -> None:
    text, _ = report(world, tmp_path)
    loudness = text.partition('id="loudness_lufs"')[2].partition("</section>")[0]
    assert re.findall(r'class="value">([^<]+)<', loudness) == ["-4", "-3", "0", "-1"]
    assert "cannot be shown: not_media" in loudness
    clipped = text.partition('id="clipped_share"')[2].partition("</section>")[0]
    assert "Most clips have the least value." in clipped
    assert re.findall(r'class="value">([^<]+)<', clipped) == ["0.25", "0"]
    assert "5 of 6 clips" in loudness
    assert re.search(r"Not known of any clip: .*semantic", text)
    # The length of all clips is one number: a line in the table, nothing to look at.
    assert 'id="valid_s"' not in text
    assert "<td>valid_s</td><td>6</td><td>2.5</td>" in text


def test_the_page_is_a_function_of_what_it_shows(world: Path, tmp_path: Path) -> None:
    assert report(world, tmp_path / "a")[0] == report(world, tmp_path / "b")[0]


def test_a_contact_sheet_holds_eight_frames_from_first_to_last_in_reading_order() -> None:
    frames = np.stack([np.full((64, 64, 3), 30 * (index // 10), np.uint8) for index in range(80)])
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(frames))))
    assert sheet.shape == (224, 448, 3)
    levels = [sheet[56 + 112 * row, 56 + 112 * column, 0] for row in range(2) for column in range(4)]
    assert levels == pytest.approx([0, 30, 60, 90, 120, 150, 180, 210], abs=4)


def test_numbers_are_short_and_never_minus_zero() -> None:
    assert [shown(value) for value in (-0.0, 1 / 3, 44100.0, 1e-7)] == ["0", "0.3333", "44100", "1e-07"]


def test_a_page_without_examples_is_a_page() -> None:
    spread = Spread(name="peak", meaning="m", num_known=1, quantiles=(0.0,) * 7)
    example = Example(clip_id="c", split="val", caption="", value=1.0, media=None, problem=EVIL)
    section = Section(spread=spread, histogram_svg="<svg></svg>", lowest=(), highest=(example,))
    page = CurationPage(about="a", num_clips=1, spreads=[spread], sections=[section], unknown=[], lineage={})
    assert "script" not in parsed(page.to_html()).names


def test_a_page_of_no_examples_is_refused() -> None:
    with pytest.raises(InputError, match="--num-examples must be at least 1"):
        ReportSettings(num_examples=0)
