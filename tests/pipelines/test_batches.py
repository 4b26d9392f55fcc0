"""Batches come from whole row groups, with only the columns asked for, and hold the right rows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.data.contracts import FEATURES, PAIRS
from pipelines.data.store import Dataset, Part
from pipelines.errors import InputError
from pipelines.training.batches import BatchSource, Prefetched, RowGroups, validation_batches
from pipelines.training.objective import Batch, DataMix, DataRef, Draws, sample_generator
from pipelines.training.order import BatchPlan, GlobalOrder
from tests.feature_factory import write_features, write_pairs
from tests.toy_objective import ToyObjective


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_features(tmp_path_factory.mktemp("data") / "features", {"train": 150, "val": 20})


def _groups(features: Path, split: str = "train") -> RowGroups:
    return RowGroups(DataRef(location=str(features), contract="features", split=split), ("clip_id", "text_features"))


def test_rows_are_taken_in_the_order_asked_across_row_groups(features: Path) -> None:
    groups = _groups(features)
    assert groups.sizes == (64, 64, 22)
    taken = groups.take(np.array([[2, 3], [0, 63], [1, 0], [0, 0], [2, 3]]))
    names = ["train_00131", "train_00063", "train_00064", "train_00000", "train_00131"]
    assert taken["clip_id"].to_pylist() == names
    assert taken.column_names == ["clip_id", "text_features"]


def _source(features: Path, world: int, rank: int, accumulation: int = 1) -> BatchSource:
    def collate(rows: pa.Table, draws: Draws) -> Batch:
        return ToyObjective(features=str(features)).collate(rows, draws) | {
            "clip": _numbers(rows["clip_id"].to_pylist())
        }

    groups = RowGroups(
        DataRef(location=str(features), contract="features", split="train"),
        ("clip_id", "text_features", "latent_mean"),
    )
    return BatchSource(
        groups=groups,
        order=GlobalOrder(groups.sizes, seed=1),
        plan=BatchPlan(12, world, accumulation),
        rank=rank,
        seed=1,
        collate=collate,
    )


def test_a_dataset_larger_than_the_cache_is_read_once_an_epoch_and_never_held_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = write_features(tmp_path / "large", {"train": 64 * 12})
    columns = ("clip_id", "sync_features")
    groups = RowGroups(DataRef(location=str(features), contract="features", split="train"), columns)
    group_bytes = groups.take(np.array([[0, 0]])).nbytes * 64
    # Room for the four row groups of a window and the first of the next; the dataset has twelve.
    monkeypatch.setattr("pipelines.training.batches.CACHE_BYTES", round(5.5 * group_bytes))
    reads: list[tuple[str, int]] = []
    read = Dataset.read_row_group

    def counted(self: Dataset, part: Part, index: int, names: Sequence[str] | None = None) -> pa.Table:
        reads.append((part.path, index))
        return read(self, part, index, names)

    monkeypatch.setattr(Dataset, "read_row_group", counted)
    fresh = RowGroups(DataRef(location=str(features), contract="features", split="train"), columns)
    order = GlobalOrder(fresh.sizes, seed=3)
    before, most = pa.total_allocated_bytes(), 0
    for start in range(0, order.num_rows, 16):
        fresh.take(order.epoch(0)[start : start + 16])
        most = max(most, pa.total_allocated_bytes() - before)
    assert len(reads) == len(set(reads)) == 12
    # Beside the cache there is the row group that is being read, in two or three forms, and a batch; not all twelve.
    assert most < 10.5 * group_bytes


def _numbers(names: list[str]):
    import torch

    return torch.tensor([int(name.split("_")[1]) for name in names])


def test_two_ranks_together_see_the_samples_and_the_noise_of_one(features: Path) -> None:
    alone = list(_source(features, 1, 0).micro_batches(0, 16))
    pair = [list(_source(features, 2, rank).micro_batches(0, 16)) for rank in (0, 1)]
    for step, whole in enumerate(alone):
        for rank in (0, 1):
            assert pair[rank][step]["clip"].tolist() == whole["clip"][rank::2].tolist()
            assert (pair[rank][step]["target"] == whole["target"][rank::2]).all()


def test_the_epoch_border_inside_a_batch_loses_and_doubles_nothing(features: Path) -> None:
    batches = list(_source(features, 1, 0).micro_batches(0, 25))
    clips = [int(clip) for batch in batches for clip in batch["clip"]]
    assert sorted(clips[:150]) == sorted(clips[150:300]) == list(range(150))
    assert clips[:150] != clips[150:300]


def test_a_source_that_starts_later_continues_the_sequence(features: Path) -> None:
    whole = [batch["clip"].tolist() for batch in _source(features, 1, 0, accumulation=2).micro_batches(0, 14)]
    tail = [batch["clip"].tolist() for batch in _source(features, 1, 0, accumulation=2).micro_batches(9, 14)]
    assert whole[18:] == tail


def test_validation_uses_all_whole_batches_in_order_with_the_same_draws(features: Path) -> None:
    toy = ToyObjective(features=str(features))
    groups = RowGroups(toy.validation_data or toy.training_data, toy.columns)
    first, again = (list(validation_batches(groups, BatchPlan(8, 1), 0, 3, toy.collate, whole=8)) for _ in range(2))
    assert [batch["position"].tolist() for batch in first] == [list(range(8)), list(range(8, 16))]
    # Smaller micro batches see the same rows.
    parts = list(validation_batches(groups, BatchPlan(8, 1, 2), 0, 3, toy.collate, whole=8))
    assert [position for batch in parts for position in batch["position"].tolist()] == list(range(16))
    assert all((a["target"] == b["target"]).all() for a, b in zip(first, again, strict=True))


def test_dropped_pairs_are_never_trained_on(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", num_kept=70, num_dropped=10)
    kept = {
        row["clip_id"] for row in Dataset.open(str(pairs), PAIRS).read(["clip_id", "kept"]).to_pylist() if row["kept"]
    }
    groups = RowGroups(
        DataRef(location=str(pairs), contract="pairs", split=None, keep_column="kept"), ("clip_id", "winner")
    )
    assert sum(groups.sizes) == 70
    everything = groups.take(np.array([[g, row] for g, size in enumerate(groups.sizes) for row in range(size)]))
    assert set(everything["clip_id"].to_pylist()) == kept


def test_a_split_without_rows_names_the_splits_there_are(features: Path) -> None:
    with pytest.raises(InputError, match=r"rpo.*'train': 150"):
        _groups(features, "rpo")
    with pytest.raises(InputError, match="no column"):
        RowGroups(DataRef(location=str(features), contract=FEATURES.name, split="train"), ("nonsense",)).take(
            np.array([[0, 0]])
        )


def test_an_error_in_the_reader_thread_is_raised_where_the_batch_is_taken() -> None:
    def failing():
        yield {}
        raise OSError("storage is gone")

    batches = iter(Prefetched(failing()))
    assert next(batches) == {}
    with pytest.raises(OSError, match="storage is gone"):
        next(batches)


def test_closing_stops_the_reader_in_the_middle() -> None:
    def endless():
        while True:
            yield {}

    prefetched = Prefetched(endless())
    next(iter(prefetched))
    prefetched.close()
    assert not prefetched._thread.is_alive()


def test_the_draws_of_a_sample_depend_on_its_position_and_stream_alone() -> None:
    import torch

    def draw(seed: int, stream, position: int) -> float:
        return float(torch.rand((), generator=sample_generator(seed, stream, position)))

    values = {(s, t, p): draw(s, t, p) for s in (0, 1) for t in ("training", "validation") for p in (0, 1, 10**9)}
    assert len(set(values.values())) == len(values)
    assert values == {key: draw(*key) for key in values}


def _mix(*features: Path, weights: tuple[int, ...]) -> RowGroups:
    refs = tuple(DataRef(location=str(place), contract="features", split="train") for place in features)
    return RowGroups(DataMix(members=refs, weights=weights), ("clip_id", "has_video"))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows without video, of which the training split has 70."""
    out = tmp_path_factory.mktemp("data") / "words"
    return write_features(out, {"train": 70}, seed=1, has_video=False, prefix="words_")


def test_a_mixture_gives_the_rows_of_both_datasets_in_their_shares_and_one_dataset_its_own_order(
    features: Path, words: Path
) -> None:
    groups = _mix(features, words, weights=(3, 1))
    assert groups.sizes == (64, 64, 22, 64, 6)
    taken = groups.take(groups.order(0).finder()(np.arange(280)))
    names = np.array(taken["clip_id"].to_pylist()).reshape(70, 4)
    is_words = np.char.startswith(names, "words_")
    assert (is_words.sum(axis=1) == 1).all()
    assert sorted(names[is_words]) == [f"words_train_{index:05d}" for index in range(70)]
    assert sorted(names[~is_words][:150]) == [f"train_{index:05d}" for index in range(150)]
    assert (~np.array(taken["has_video"].to_pylist()).reshape(70, 4) == is_words).all()
    alone = _mix(features, weights=(1,))
    assert alone.order(7) == GlobalOrder(alone.sizes, 7)


def test_windows_of_all_datasets_stay_in_memory(features: Path, words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.training.batches.CACHE_BYTES", 1)
    reads: list[tuple[str, int]] = []
    read = Dataset.read_row_group

    def counted(self: Dataset, part: Part, index: int, names: Sequence[str] | None = None) -> pa.Table:
        reads.append((self.folder.uri, index))
        return read(self, part, index, names)

    groups = _mix(features, words, weights=(2, 1))
    monkeypatch.setattr(Dataset, "read_row_group", counted)
    find = groups.order(0).finder()
    for start in range(0, 210, 10):
        groups.take(find(np.arange(start, start + 10)))
    assert len(reads) == len(set(reads)) == 5


def test_a_mixture_of_two_contracts_has_nulls_where_a_dataset_has_no_such_column(
    features: Path, tmp_path: Path
) -> None:
    pairs = write_pairs(tmp_path / "pairs", num_kept=5, num_dropped=0)
    mix = DataMix(
        members=(
            DataRef(location=str(features), contract=FEATURES.name, split="val"),
            DataRef(location=str(pairs), contract=PAIRS.name, split=None),
        ),
        weights=(2, 1),
    )
    groups = RowGroups(mix, ("clip_id", "latent_mean", "loser", "loser_origin"))
    taken = groups.take(groups.order(0).finder()(np.arange(9)))
    rows = taken.select(["clip_id", "loser_origin"]).to_pylist()
    is_pair = np.array([row["clip_id"].startswith("pair_") for row in rows])
    assert is_pair.reshape(3, 3).sum(axis=1).tolist() == [1, 1, 1]
    assert [row["loser_origin"] for row in rows] == ["candidate_0" if pair else None for pair in is_pair]
    assert taken["latent_mean"].is_null().to_pylist() == is_pair.tolist()
    assert taken["loser"].is_null().to_pylist() == (~is_pair).tolist()
    own = {
        row["clip_id"]: row["loser"] for row in Dataset.open(str(pairs), PAIRS).read(["clip_id", "loser"]).to_pylist()
    }
    for row, pair in zip(taken.select(["clip_id", "loser"]).to_pylist(), is_pair, strict=True):
        assert not pair or row["loser"] == own[row["clip_id"]]
    alone = groups.take(np.array([(0, 1), (0, 0)]))
    assert alone.column_names == ["clip_id", "latent_mean"]
    with pytest.raises(InputError, match="no column looser in any contract"):
        RowGroups(mix, ("clip_id", "looser"))
