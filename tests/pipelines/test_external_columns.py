import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipelines.errors import InputError
from pipelines.evaluation.embedding_metrics import COLUMNS
from pipelines.evaluation.external import ExternalFiles
from pipelines.evaluation.external_columns import ALL_CLIPS, WITHOUT_VGG_SS, mmaudio_columns
from pipelines.evaluation.metrics import frechet_distance, inception_score, kl_divergence
from tests.pipelines.external_factory import clip_names, write_external

CLIPS = 40
NAMES = clip_names(CLIPS)
WIDTHS = {
    "passt_embeddings": 6,
    "passt_logits": 5,
    "panns_embeddings": 7,
    "panns_logits": 5,
    "vggish_embeddings": 256,
    "imagebind_embeddings": 8,
    "synchformer_logits": 42,
}


@pytest.fixture
def values() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """kind -> (generated, reference) of 40 clips."""
    rng = np.random.default_rng(4)
    return {kind: (rng.normal(size=(CLIPS, width)), rng.normal(size=(CLIPS, width))) for kind, width in WIDTHS.items()}


@pytest.fixture
def files(values: dict, tmp_path: Path) -> dict[str, ExternalFiles]:
    """The same as files, the generated ones backwards: position says nothing."""
    return {
        kind: ExternalFiles(
            generated=write_external(tmp_path / "made" / f"{kind}.npz", NAMES[::-1], generated[::-1]),
            reference=None
            if kind == "synchformer_logits"
            else write_external(tmp_path / "real" / f"{kind}.parquet", NAMES, reference),
        )
        for kind, (generated, reference) in values.items()
    }


def one(tmp_path: Path, kind: str, generated: tuple, reference: tuple | None) -> dict[str, ExternalFiles]:
    """Files of one kind, each from (ids, values)."""
    return {
        kind: ExternalFiles(
            generated=write_external(tmp_path / "generated.npz", *generated),
            reference=None if reference is None else write_external(tmp_path / "reference.npz", *reference),
        )
    }


def test_golden_values_come_out_of_shuffled_files(fixtures: Path, tmp_path: Path) -> None:
    inputs = load_file(fixtures / "world" / "metrics.safetensors")
    expected = json.loads((fixtures / "world" / "metrics.json").read_text())
    files = {}
    for kind, ending in (("panns_embeddings", "feat"), ("panns_logits", "logits")):
        places = []
        for seed, side in enumerate(("pred", "gt")):
            rows = inputs[f"{side}_{ending}"]
            order = np.random.default_rng(seed).permutation(len(rows))
            ids = [clip_names(len(rows))[i] for i in order]
            places.append(write_external(tmp_path / side / f"{kind}.safetensors", ids, rows[order]))
        files[kind] = ExternalFiles(generated=places[0], reference=places[1])
    row = mmaudio_columns(files).values[ALL_CLIPS]
    assert row["KL_PANNs"].value == pytest.approx(expected["kl"]["kl_softmax"], rel=1e-7)
    assert row["IS"].value == pytest.approx(expected["isc"]["inception_score_mean"], rel=1e-12)
    # 72 real rows and 64 generated ones: here the distance is over the 64 clips of both.
    shared = frechet_distance(inputs["gt_feat"][:64], inputs["pred_feat"])
    assert row["FD_PANNs"].value == pytest.approx(shared, rel=1e-9)
    assert (row["FD_PANNs"].num_clips, row["FD_PANNs"].num_missing) == (64, 8)


def test_all_files_give_all_columns_in_order_over_all_clips(files: dict, values: dict) -> None:
    row = mmaudio_columns(files).values[ALL_CLIPS]
    assert list(row) == [c.name for c in COLUMNS]
    assert {(v.num_clips, v.num_missing, v.num_extra) for v in row.values()} == {(CLIPS, 0, 0)}
    made, real = values["passt_embeddings"]
    assert row["FD_PaSST"].value == pytest.approx(frechet_distance(made, real))
    made, real = values["passt_logits"]
    assert row["KL_PaSST"].value == pytest.approx(kl_divergence(real, made))
    assert row["IS"].value == pytest.approx(inception_score(values["panns_logits"][0])[0])


def test_perfect_sound_has_no_distance_and_a_cosine_of_one_hundred(files: dict) -> None:
    same = {
        kind: ExternalFiles(generated=pair.reference, reference=pair.reference)
        for kind, pair in files.items()
        if pair.reference is not None
    }
    row = mmaudio_columns(same).values[ALL_CLIPS]
    for name in ("FD_PaSST", "FD_PANNs", "FD_VGG", "KL_PANNs", "KL_PaSST"):
        assert row[name].value == pytest.approx(0.0, abs=1e-4)
    assert row["IB-score"].value == pytest.approx(100.0)


def test_a_column_is_there_only_where_its_files_are(files: dict) -> None:
    logits = {"panns_logits": ExternalFiles(generated=files["panns_logits"].generated)}
    made = mmaudio_columns(logits)
    assert list(made.values[ALL_CLIPS]) == ["IS"]
    assert made.cautions == ("KL_PANNs is left out: panns_logits has no reference file.",)
    assert list(mmaudio_columns({k: files[k] for k in ("synchformer_logits",)}).values[ALL_CLIPS]) == ["DeSync"]
    assert mmaudio_columns({}).values == {ALL_CLIPS: {}}


def test_clips_that_one_file_lacks_are_left_out_counted_and_told(values: dict, tmp_path: Path) -> None:
    made, real = values["passt_logits"]
    pair = one(tmp_path, "passt_logits", (NAMES[3:], made[3:]), (NAMES[:-1], real[:-1]))
    columns = mmaudio_columns(pair)
    kl = columns.values[ALL_CLIPS]["KL_PaSST"]
    assert (kl.num_clips, kl.num_missing, kl.num_extra) == (CLIPS - 4, 3, 1)
    assert kl.value == pytest.approx(kl_divergence(real[3:-1], made[3:-1]))
    missing, extra = columns.cautions
    assert "3 clips of" in missing
    assert "'clip_000000'" in missing
    assert "1 clips of" in extra
    assert "'clip_000039'" in extra


def test_vgg_ss_is_left_out_of_a_second_row(files: dict, values: dict) -> None:
    columns = mmaudio_columns(files, vgg_ss_ids=[*NAMES[:15], "not_here"])
    every, rest = columns.values[ALL_CLIPS], columns.values[WITHOUT_VGG_SS]
    assert every == mmaudio_columns(files).values[ALL_CLIPS]
    assert list(rest) == list(every)
    assert {(v.num_clips, v.num_missing, v.num_extra) for v in rest.values()} == {(CLIPS - 15, 0, 0)}
    made, real = values["panns_logits"]
    assert rest["KL_PANNs"].value == pytest.approx(kl_divergence(real[15:], made[15:]))
    assert rest["IS"].value == pytest.approx(inception_score(made[15:])[0])


def test_windows_of_a_vgg_ss_file_are_left_out_too(values: dict, tmp_path: Path) -> None:
    windows = [f"{name}#{start}" for name in NAMES[: CLIPS // 2] for start in (0, 8000)]
    made, real = values["passt_logits"]
    pair = one(tmp_path, "passt_logits", (windows, made), (windows, real))
    rest = mmaudio_columns(pair, vgg_ss_ids={NAMES[0]}).values[WITHOUT_VGG_SS]
    assert rest["KL_PaSST"].num_clips == CLIPS - 2
    assert rest["KL_PaSST"].value == pytest.approx(kl_divergence(real[2:], made[2:]))


def test_too_few_clips_for_a_column_leave_it_out_and_say_so(files: dict) -> None:
    columns = mmaudio_columns(files, vgg_ss_ids=NAMES[:-5])
    assert "IS" not in columns.values[WITHOUT_VGG_SS]
    assert "IS" in columns.values[ALL_CLIPS]
    assert "IS of without vgg ss is left out: it needs 10 clips or more and there are 5." in columns.cautions
    assert mmaudio_columns(files, vgg_ss_ids=NAMES).values[WITHOUT_VGG_SS] == {}


def test_ids_of_vgg_ss_that_match_nothing_are_told(files: dict) -> None:
    told = mmaudio_columns(files, vgg_ss_ids={"clip_000001.mp4"}).cautions
    assert [c for c in told if c.startswith("None of the 1 VGG-SS ids")]
    assert not [c for c in mmaudio_columns(files, vgg_ss_ids={NAMES[1]}).cautions if "None of" in c]


def test_a_frechet_distance_over_few_clips_comes_with_its_caution(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    for count, cautious in ((1999, True), (2000, False)):
        rows = (clip_names(count), rng.normal(size=(count, 2)))
        columns = mmaudio_columns(one(tmp_path, "panns_embeddings", rows, rows))
        assert bool(columns.cautions) == cautious
    assert not mmaudio_columns(one(tmp_path, "passt_logits", rows, rows)).cautions


def test_pairs_of_unequal_widths_or_without_a_common_clip_are_refused(values: dict, tmp_path: Path) -> None:
    made, real = values["passt_logits"]
    with pytest.raises(InputError, match=r"have 5 values and those of .* 4; make both with the same network"):
        mmaudio_columns(one(tmp_path, "passt_logits", (NAMES, made), (NAMES, real[:, :4])))
    others = [f"{name}.wav" for name in NAMES]
    with pytest.raises(InputError, match=r"'clip_000000'.*'clip_000000\.wav'.*no clip in common"):
        mmaudio_columns(one(tmp_path, "passt_logits", (NAMES, made), (others, real)))


def test_what_a_column_cannot_be_computed_from_is_refused_by_name(tmp_path: Path) -> None:
    ones = (NAMES, np.ones((CLIPS, 40)))
    with pytest.raises(InputError, match=r"DeSync from .*multiple of 21"):
        mmaudio_columns(one(tmp_path, "synchformer_logits", ones, None))
    with pytest.raises(InputError, match=r"FD_VGG from .*multiple of 128"):
        mmaudio_columns(one(tmp_path, "vggish_embeddings", ones, ones))
    with pytest.raises(InputError, match=r"IB-score from .*all zeros"):
        mmaudio_columns(one(tmp_path, "imagebind_embeddings", ones, (NAMES, np.zeros((CLIPS, 40)))))
    far = np.tile([1e308, -1e308], (CLIPS, 20))
    with pytest.raises(InputError, match=r"KL_PaSST from .*not a finite number"):
        mmaudio_columns(one(tmp_path, "passt_logits", (NAMES, far), ones))
    with pytest.raises(InputError, match=r"FD_PANNs from "):
        mmaudio_columns(one(tmp_path, "panns_embeddings", (NAMES, far), ones))
    with pytest.raises(InputError, match="'pann_logits': give one of passt_embeddings"):
        mmaudio_columns(one(tmp_path, "pann_logits", ones, None))


def test_text_and_json_say_every_value_with_its_clips(files: dict) -> None:
    columns = mmaudio_columns(files, vgg_ss_ids=NAMES[:35])
    text, content = columns.to_text(), json.loads(json.dumps(columns.to_json(), allow_nan=False))
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()[1:9]}
    assert list(lines) == [c.name for c in COLUMNS]
    desync = columns.values[ALL_CLIPS]["DeSync"].value
    assert lines["DeSync"][:5] == ["v", f"{desync:.3f}", "40", "0", "0"]
    assert lines["IS"][5:] == ["-"] * 4
    assert all(caution in text for caution in columns.cautions)
    assert content["values"][ALL_CLIPS]["DeSync"] == {
        "value": desync,
        "num_clips": 40,
        "num_missing": 0,
        "num_extra": 0,
    }
    assert set(content["columns"]) == set(lines)
