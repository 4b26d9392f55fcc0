"""Exclusions: ids of any list out of every split, VGG-SS out of the test split alone, both counted."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.exclusions import read_keys
from pipelines.data.ingest import Sources, gather_entries
from pipelines.errors import InputError
from tests.pipelines.list_factory import LISTS

ROWS = "abcdefghij0,1,x,train\nabcdefghij1,10,y,test\nabcdefghij2,100,z,test\nabcdefghij3,5,z,test\n"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for i, start in enumerate((1, 10, 100, 5)):
        (tmp_path / "videos").mkdir(exist_ok=True)
        (tmp_path / "videos" / f"abcdefghij{i}_{start:06d}.mp4").write_bytes(b"x")
    (tmp_path / "vggsound.csv").write_text(ROWS)
    return tmp_path


def left(corpus: Path, manifest: str = "vggsound.csv", **options: object) -> tuple[list[str], dict[str, int | None]]:
    sources = Sources(manifest=str(corpus / manifest), videos=str(corpus / "videos"), **options)  # pyright: ignore[reportArgumentType]
    entries = gather_entries(sources)
    return [r["video"][10:11] for r in entries.rows()], dict(entries.num_excluded)


def test_every_format_may_say_what_to_exclude(tmp_path: Path) -> None:
    for kind, content in LISTS.items():
        (tmp_path / "list").write_text(content)
        keys = read_keys(str(tmp_path / "list"))
        assert keys >= ({"--PJHxphWEs_000030"} if kind == "AudioSet csv" else set())
        assert keys & {"---g-f_I2yQ_000001", "-_a_b_c_d_e_000130", "-_a_b_c_d_e_000030", "-_a_b_c_d_e"}
    (tmp_path / "own.csv").write_text("caption,video\nx,deep/abcdefghijk_5.mp4\n")
    pq.write_table(pa.table({"video": ["deep/abcdefghijk_5.mp4"]}), tmp_path / "own.parquet")
    for name in ("own.csv", "own.parquet"):
        assert read_keys(str(tmp_path / name)) == {"abcdefghijk_000005"}
    with pytest.raises(InputError, match="does not exist"):
        read_keys(str(tmp_path / "absent"))


def test_ids_are_taken_out_of_every_split_and_counted(corpus: Path) -> None:
    (corpus / "one.txt").write_text("abcdefghij0_1\n")
    (corpus / "two.txt").write_text("abcdefghij2_000100.mp4\nabcdefghij0_000001\nnobody\n")
    lists = (str(corpus / "one.txt"), str(corpus / "two.txt"))
    assert left(corpus, exclude_ids=lists) == (["1", "3"], {"exclude_ids": 2, "vggss": None})


def test_vggss_is_taken_out_of_the_test_split_alone_and_is_unknown_without_its_file(corpus: Path) -> None:
    (corpus / "vggss.json").write_text('[{"file": "abcdefghij0_000001"}, {"file": "abcdefghij1_000010"}]')
    assert left(corpus, vggss=str(corpus / "vggss.json")) == (["0", "2", "3"], {"vggss": 1})
    assert left(corpus) == (["0", "1", "2", "3"], {"vggss": None})
    # A list without test clips, and one that is not VGGSound's, have nothing that could overlap.
    (corpus / "train.csv").write_text("abcdefghij0,1,x,train\n")
    assert left(corpus, "train.csv") == (["0"], {})
    (corpus / "ids.txt").write_text("abcdefghij1_10\n")
    assert left(corpus, "ids.txt", default_split="test") == (["1"], {})
    (corpus / "test.csv").write_text("abcdefghij1_000010.mp4,y\n")
    assert left(corpus, "test.csv", default_split="test") == (["1"], {"vggss": None})
    (corpus / "vgg-test.tsv").write_text("id\tlabel\nabcdefghij1_000010\ty\nabcdefghij3_000005\ty\n")
    assert left(corpus, "vgg-test.tsv", default_split="test", vggss=str(corpus / "vggss.json")) == (["3"], {"vggss": 1})


def test_what_is_excluded_changes_the_fingerprint_and_the_way_it_was_said_does_not(corpus: Path) -> None:
    (corpus / "one.txt").write_text("abcdefghij1_000010\n")
    (corpus / "same.csv").write_text("abcdefghij1,10,y,test\n")
    (corpus / "nobody.txt").write_text("nobody\n")

    def fingerprint(*names: str) -> str:
        lists = [str(corpus / name) for name in names]
        sources = Sources(manifest=str(corpus / "vggsound.csv"), videos=str(corpus / "videos"), exclude_ids=lists)
        return gather_entries(sources).fingerprint

    assert fingerprint("one.txt") == fingerprint("same.csv") != fingerprint() == fingerprint("nobody.txt")


def test_nothing_left_is_wrong_input(corpus: Path) -> None:
    with pytest.raises(InputError, match="all 4 clips are excluded"):
        left(corpus, exclude_ids=(str(corpus / "vggsound.csv"),))
