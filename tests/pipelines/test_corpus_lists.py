"""Lists of public corpora: told apart by their content, read from the right, refused with the row."""

import json
from pathlib import Path

import pytest

from pipelines.data.corpus_lists import LIST_FORMATS, read_list, sniff
from pipelines.errors import InputError
from tests.pipelines.list_factory import AUDIOSET, LISTS


def read(folder: Path, name: str, content: str) -> tuple[str, list[tuple[int, tuple[str, ...], str, str | None]]]:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    kind, _ = sniff(path, str(path))
    assert kind is not None
    return kind.name, [(c.line, c.stems, c.caption, c.split) for c in read_list(path, str(path), kind)]


def test_every_format_is_known_by_its_content_and_read_as_it_is_published(tmp_path: Path) -> None:
    expected = {
        "VGGSound csv": [
            (1, ("---g-f_I2yQ_000001",), "people marching", "test"),
            (2, ("-_a_b_c_d_e_000130",), "heart sounds, heartbeat", "train"),
        ],
        "VGGSound test csv": [
            (1, ("---g-f_I2yQ_000001",), "people marching", None),
            (2, ("-_a_b_c_d_e_000130",), "heart sounds, heartbeat", None),
        ],
        "MMAudio tsv": [
            (2, ("---g-f_I2yQ_000001",), "people marching", None),
            (3, ("-_a_b_c_d_e_000130",), "heart sounds, heartbeat", None),
        ],
        "AudioCaps csv": [
            (2, ("-_a_b_c_d_e_000030", "-_a_b_c_d_e"), "A man talks, then laughs", None),
            (3, ("-_a_b_c_d_e_000030", "-_a_b_c_d_e"), "Someone speaks", None),
        ],
        "av-benchmark csv": [(2, ("---g-f_I2yQ_000001",), "people marching", None)],
        "AudioSet csv": [
            (4, ("--PJHxphWEs_000030", "--PJHxphWEs"), "", None),
            (5, ("-_a_b_c_d_e_000000", "-_a_b_c_d_e"), "", None),
        ],
        "list of ids": [(1, ("---g-f_I2yQ_000001",), "", None), (3, ("-_a_b_c_d_e_000130",), "", None)],
        "VGG-SS json": [
            (1, ("---g-f_I2yQ_000001",), "people marching", None),
            (2, ("-_a_b_c_d_e_000130",), "", None),
        ],
    }
    assert {kind.name for kind in LIST_FORMATS} == set(expected) == set(LISTS)
    for kind, content in LISTS.items():
        # The name says nothing, but for the tabs of a .tsv.
        assert read(tmp_path, "list.csv", content) == (kind, expected[kind])
        assert read(tmp_path, "list.txt", "\ufeff" + content.replace("\n", "\r\n")) == (kind, expected[kind])


def test_our_own_manifest_is_what_has_a_column_video(tmp_path: Path) -> None:
    for text, delimiter in (("caption,video\n", ","), ("video\tcaption\n", "\t"), ("video\n", ",")):
        path = tmp_path / "clips.csv"
        path.write_text(text)
        assert sniff(path, str(path)) == (None, delimiter)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('abcdefghijk,1,"a, b",test\nabcdefghijk,1,a, b,test\n', "line 2: 5 fields, a VGGSound csv has 4"),
        ("abcdefghijk,1,a,test\nabcdefghijk,1,a,val\n", "line 2: split 'val' is neither train nor test"),
        ("abcdefghijk,soon,a,test\n", "line 1: the start 'soon' is not a number"),
        ("abcdefghijk,inf,a,test\n", "line 1: the start 'inf' is not a number"),
        ("abcdefghijk,-3,a,test\n", "line 1: the start is -3"),
        ("abcdefghijk,1,a,test\n,1,a,test\n", "line 2: the id is empty"),
        ("../../etc/x_1.mp4,a\n", "line 1: '../../etc/x_1' is not an id"),
        ("id\tlabel\na\tb\tc\n", "line 2: 3 fields"),
        ("id\tlabel\na/b\tc\n", "line 2: 'a/b' is not an id"),
        (AUDIOSET.replace("30.000", "x"), "line 4: the start 'x' is not a number"),
        ('[{"file": "a"}, {"class": "b"}]', "item 2: not an object with the text 'file'"),
        ('[{"file": "\\ud800"}]', "item 1"),
        ('[{"file": 3}]', "item 1"),
        ('{"file": "a"}', "not a list of objects"),
        ("[" * 100_000, "is not JSON"),
        ('[{"file": "a"}', "is not JSON"),
        ("a,b,c\n", "no column 'video' among: a, b, c"),
        ("a\tb\n", "no column 'video'"),
        ("\n", "is empty"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_row(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, "list.csv", content)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_real_shape_of_vggss_is_read(tmp_path: Path) -> None:
    items = [{"file": f"-d{i:09d}_000030", "class": "dog barking", "bbox": [[0.1, 0.2, 0.3, 1.4]]} for i in range(50)]
    kind, clips = read(tmp_path, "vggss.json", json.dumps(items, indent=1))
    assert kind == "VGG-SS json"
    assert [stems[0] for _, stems, _, _ in clips] == [item["file"] for item in items]


def test_ids_are_whole_lines(tmp_path: Path) -> None:
    assert read(tmp_path, "ids.txt", 'a b\nc,d "e\n') == (
        "list of ids",
        [(1, ("a b",), "", None), (2, ('c,d "e',), "", None)],
    )
