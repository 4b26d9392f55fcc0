import contextlib
import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from pipelines.data.tables import tensor_column
from pipelines.errors import InputError
from pipelines.evaluation.external import ExternalFiles, files_in, is_among, read_external, read_ids
from tests.pipelines.external_factory import clip_names, write_external

SUFFIXES = [".parquet", ".npz", ".safetensors"]
VALUES = np.arange(12, dtype=np.float32).reshape(4, 3) / 7
SHUFFLED = [2, 0, 3, 1]


def refusal(location: Path | str) -> str:
    """What the reader says of a file, which is one line and names it."""
    with pytest.raises(InputError) as caught:
        read_external(str(location))
    message = str(caught.value)
    assert "\n" not in message
    assert str(location) in message
    return message


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_each_form_gives_the_same_rows_sorted_by_id(suffix: str, dtype: type, tmp_path: Path) -> None:
    names, values = clip_names(4), VALUES.astype(dtype)
    rows = read_external(write_external(tmp_path / f"x{suffix}", [names[i] for i in SHUFFLED], values[SHUFFLED]))
    assert rows.clip_ids == tuple(names)
    assert rows.values.dtype == np.float64
    np.testing.assert_array_equal(rows.values, values.astype(np.float64))


def test_parquet_may_hold_tensors_fixed_lists_row_groups_and_coded_ids(tmp_path: Path) -> None:
    names = clip_names(4)
    coded, large = pa.array(names).dictionary_encode(), pa.array(names, pa.large_string())
    columns = {
        "tensor": tensor_column(VALUES),
        "fixed": pa.FixedSizeListArray.from_arrays(pa.array(VALUES.ravel()), 3),
        "large": pa.array(list(VALUES), pa.large_list(pa.float32())),
    }
    for (name, column), ids in zip(columns.items(), (coded, large, pa.array(names)), strict=True):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"clip_id": ids, name: column}), path, row_group_size=3)
        assert read_external(str(path)).clip_ids == tuple(names)
        np.testing.assert_array_equal(read_external(str(path)).values, VALUES)


def test_bfloat16_of_safetensors_and_bytes_of_npz_are_read(tmp_path: Path) -> None:
    names = clip_names(4)
    tensor = torch.from_numpy(VALUES).bfloat16()
    save_file({"logits": tensor}, tmp_path / "x.safetensors", metadata={"clip_id": json.dumps(names)})
    np.testing.assert_array_equal(read_external(str(tmp_path / "x.safetensors")).values, tensor.double().numpy())
    np.savez(tmp_path / "x.npz", clip_id=np.array([name.encode() for name in names]), logits=VALUES)
    assert read_external(str(tmp_path / "x.npz")).clip_ids == tuple(names)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_is_cut_short_or_foreign_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    assert "does not exist" in refusal(path)
    content = Path(write_external(path, clip_names(4), VALUES)).read_bytes()
    for broken in (b"", b"words\n" * 9, content[: len(content) // 2], content[:-5], pickle.dumps(VALUES)):
        path.write_bytes(broken)
        assert "cannot be used" in refusal(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_flipped_byte_is_refused_or_read_and_never_another_error(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    content = Path(write_external(path, clip_names(4), VALUES)).read_bytes()
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        # A file without a checksum may still read as rows; what it may not do is end in another error.
        with contextlib.suppress(InputError):
            assert read_external(str(path)).values.shape == (4, 3)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", clip_id=np.array(clip_names(4), dtype=object), embedding=VALUES)
    assert "allow_pickle=False" in refusal(tmp_path / "x.npz")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_ids_that_come_twice_are_empty_or_lack_a_row_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    write_external(path, ["a", "b", "a", "c"], VALUES)
    assert "1 rows repeat an id, such as 'a'" in refusal(path)
    write_external(path, ["a", "", "b", "c"], VALUES)
    assert "row 1 is empty" in refusal(path)
    if suffix != ".parquet":
        write_external(path, ["a", "b", "c"], VALUES)
        assert "3 ids and an array of shape (4, 3)" in refusal(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_value_that_is_not_finite_is_refused_with_its_clip(suffix: str, bad: float, tmp_path: Path) -> None:
    values = VALUES.copy()
    values[2, 1] = bad
    message = refusal(write_external(tmp_path / f"x{suffix}", ["d", "c", "b", "a"], values))
    assert "1 clips have values that are not finite, such as 'b'" in message


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([[1.0, 2.0], [3.0]], "all must have one width"),
        ([[1.0, 2.0], None], "1 rows are null"),
        ([[1.0, 2.0], [None, 3.0]], "not finite, such as 'b'"),
        ([[], []], "an array of shape (2, 0)"),
    ],
)
def test_parquet_rows_of_unequal_widths_and_nulls_are_refused(rows: list, says: str, tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"clip_id": ["a", "b"], "v": pa.array(rows, pa.list_(pa.float32()))}), tmp_path / "x.parquet"
    )
    assert says in refusal(tmp_path / "x.parquet")


def test_a_file_without_ids_or_with_none_or_two_arrays_is_refused(tmp_path: Path) -> None:
    lists = pa.array(list(VALUES), pa.list_(pa.float32()))
    names = pa.array(clip_names(4))
    tables = {
        "clip_id": {"embedding": lists},
        "not a list of texts": {"clip_id": pa.array(range(4)), "embedding": lists},
        "1 ids": {"clip_id": pa.array(["a", "b", "c", None]), "embedding": lists},
        "0 float arrays": {"clip_id": names, "level": pa.array([0.5] * 4)},
        "2 float arrays": {"clip_id": names, "embedding": lists, "logits": lists},
    }
    for says, columns in tables.items():
        pq.write_table(pa.table(columns), tmp_path / "x.parquet")
        assert says in refusal(tmp_path / "x.parquet")
    arrays = {
        "no array 'clip_id'": {"embedding": VALUES},
        "not a list of texts": {"clip_id": np.arange(4), "embedding": VALUES},
        "0 float arrays": {"clip_id": np.array(clip_names(4)), "embedding": VALUES.astype(int)},
        "2 float arrays": {"clip_id": np.array(clip_names(4)), "embedding": VALUES, "logits": VALUES},
    }
    for says, content in arrays.items():
        np.savez(tmp_path / "x.npz", **content)
        assert says in refusal(tmp_path / "x.npz")
    save_file({"embedding": torch.from_numpy(VALUES)}, tmp_path / "x.safetensors")
    assert "metadata have no 'clip_id'" in refusal(tmp_path / "x.safetensors")


def test_a_file_without_clips_and_an_unknown_suffix_are_refused(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        refusal(write_external(tmp_path / f"x{suffix}", [], VALUES[:0]))
    assert "not one of .parquet, .npz, .safetensors" in refusal(tmp_path / "x.pth")


def test_an_archive_of_other_things_is_refused(tmp_path: Path) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("clip_id.npy", b"nothing")
    (tmp_path / "x.npz").write_bytes(content.getvalue())
    refusal(tmp_path / "x.npz")


def test_folders_give_the_files_of_each_kind(tmp_path: Path) -> None:
    made, real = tmp_path / "made", tmp_path / "real"
    for place in (made / "panns_logits.npz", real / "panns_logits.parquet", made / "synchformer_logits.npz"):
        write_external(place, clip_names(4), VALUES)
    write_external(real / "passt_logits.npz", clip_names(4), VALUES)
    (made / "notes.txt").write_text("passed over")
    assert files_in(str(made), str(real)) == {
        "panns_logits": ExternalFiles(generated=f"{made}/panns_logits.npz", reference=f"{real}/panns_logits.parquet"),
        "synchformer_logits": ExternalFiles(generated=f"{made}/synchformer_logits.npz"),
    }
    assert files_in(str(made))["panns_logits"].reference is None


def test_folders_with_nothing_a_wrong_name_or_a_kind_twice_are_refused(tmp_path: Path) -> None:
    made = tmp_path / "made"
    write_external(made / "panns_logits.npz", clip_names(4), VALUES)
    for generated, reference in ((tmp_path / "none", None), (made, tmp_path / "none")):
        with pytest.raises(InputError, match="none holds no external file"):
            files_in(str(generated), reference and str(reference))
    with pytest.raises(InputError, match="is a file; give another one"):
        files_in(str(made / "panns_logits.npz"))
    write_external(made / "panns_logits.parquet", clip_names(4), VALUES)
    with pytest.raises(InputError, match="panns_logits twice"):
        files_in(str(made))
    write_external(made / "pann_logits.npz", clip_names(4), VALUES)
    with pytest.raises(InputError, match="'pann_logits' is no kind"):
        files_in(str(made))


def test_ids_are_read_from_vggss_json_and_from_lines(tmp_path: Path) -> None:
    ids = {"-0abc_d_000030", "zz_000001"}
    (tmp_path / "vggss.json").write_text(json.dumps([{"file": i, "class": "dog", "bbox": []} for i in sorted(ids)]))
    (tmp_path / "vggss_test.csv").write_bytes("\ufeff-0abc_d_000030\r\nzz_000001\r\n\r\n".encode())
    assert read_ids(str(tmp_path / "vggss.json")) == read_ids(str(tmp_path / "vggss_test.csv")) == ids


@pytest.mark.parametrize("content", ["", "[]", "{", '["a"]', '[{"name": "a"}]', '[{"file": 3}]', "7"])
def test_a_list_of_ids_that_cannot_be_read_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text(content)
    with pytest.raises(InputError, match=r"ids\.json"):
        read_ids(str(tmp_path / "ids.json"))
    with pytest.raises(InputError, match="does not exist"):
        read_ids(str(tmp_path / "none.txt"))


def test_windows_of_a_file_belong_to_it() -> None:
    assert is_among("abc_000030", {"abc_000030"})
    assert is_among("abc_000030#8000", {"abc_000030"})
    assert not is_among("abc_000031", {"abc_000030", ""})
