"""The two commands that look at an artifact: what they print, and how they end."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import cli, inspect_dataset, preprocess, verify
from pipelines.errors import EXIT_DONE, EXIT_REFUSED, InputError
from tests.feature_factory import write_pairs
from tests.pipelines.clip_factory import simple_clip


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good clips, two captions, one file that is not there."""
    folder = tmp_path_factory.mktemp("inspected")
    for name in ("a", "b", "c"):
        simple_clip(folder / f"{name}.mp4")
    lines = ["video,caption,split", "a.mp4,a <b>bell</b> rings,train", "b.mp4,,train", "c.mp4,$x$ and _y,val"]
    (folder / "clips.csv").write_text("\n".join([*lines, "gone.mp4,,val"]) + "\n")
    words = ["tiny", "--manifest", str(folder / "clips.csv"), "--out", str(folder / "out"), "--num-workers", "0"]
    assert preprocess.main(cli.parse("preprocess", preprocess.Options, words)) == EXIT_DONE
    return folder / "out"


def inspect(*words: str) -> int:
    return inspect_dataset.main(cli.parse("inspect_dataset", inspect_dataset.Options, words))


def check(*words: str) -> int:
    return verify.main(cli.parse("verify", verify.Options, words))


def test_the_card_tells_rows_splits_captions_rejects_and_lineage(
    features: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect("--dataset", str(features)) == EXIT_DONE
    card = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    card = {name: value.strip() for name, value in card.items()}
    manifest = json.loads((features / "manifest.json").read_text())
    assert card["counts"] == "4 in, 3 out, 1 rejected, 0 repeated"
    assert card["splits"] == "2 train, 1 val"
    assert card["rejects"] == "1 missing"
    assert card["captions"] == "2 different, 1 rows without"
    assert card["digest"] == manifest["digest"]
    assert card["made from manifest"] == manifest["inputs"]["manifest"]
    assert "encoders=grids" in card["options"]


def test_the_contact_sheet_shows_every_clip_with_its_picture_and_its_sound(features: Path, tmp_path: Path) -> None:
    sheets = {}
    for count in (1, 3):
        path = tmp_path / "deep" / f"{count}.png"
        assert inspect("--dataset", str(features), "--sheet", str(path), "--num-clips", str(count)) == EXIT_DONE
        sheets[count] = np.asarray(Image.open(path).convert("RGB"))
    # A clip more is a strip more; a strip holds the dark picture, the light page and the spectrum's colours.
    assert sheets[3].shape[0] == pytest.approx(3 * sheets[1].shape[0], abs=6)
    assert sheets[1].min() < 50
    assert sheets[1].max() > 240
    colourful = sheets[1].max(axis=2).astype(int) - sheets[1].min(axis=2)
    assert (colourful > 60).mean() > 0.02


def test_other_contracts_have_a_card_too_and_no_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = write_pairs(tmp_path / "pairs", num_kept=2, num_dropped=1)
    assert inspect("--dataset", str(pairs)) == EXIT_DONE
    assert "pairs/1" in capsys.readouterr().out
    with pytest.raises(InputError, match="holds pairs/1, this code reads features/3"):
        inspect("--dataset", str(pairs), "--sheet", str(tmp_path / "x.png"))


def test_verify_ends_well_on_what_is_whole_and_refuses_what_was_altered(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check("--artifact", str(features), "--rows", "2") == EXIT_DONE
    assert "rows made again: 2 equal, 0 close, 0 differs, 0 gone" in capsys.readouterr().out
    pairs = write_pairs(tmp_path / "pairs", num_kept=2, num_dropped=1)
    part = next((pairs / "data").iterdir())
    content = bytearray(part.read_bytes())
    content[60] ^= 0xFF
    part.write_bytes(content)
    assert check("--artifact", str(pairs)) == EXIT_REFUSED
    assert f"data/{part.name}: its sha256 is not the manifest's" in capsys.readouterr().out
