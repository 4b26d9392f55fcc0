import json

import pytest

from pipelines.tracking_journal import (
    HIDDEN,
    JOURNAL,
    Journal,
    Shipped,
    clean_name,
    clean_path,
    flatten,
    is_closed,
    load_shipped,
    num_unshipped,
    read_lines,
    save_shipped,
    without_credentials,
)


def records(folder):
    return [line.record for line in read_lines(folder)]


def test_parameters_are_flattened_and_secrets_are_hidden():
    flat = flatten(
        {
            "optimizer": {"lr": 1e-3, "betas": (0.9, 0.95)},
            "hf_token": "hf_abc",
            "store": {"aws_secret_access_key": "x", "uri": "s3://me:pw@bucket/a"},
            "db": "postgresql://user:word@db/x",
        }
    )
    assert flat == {
        "optimizer.lr": "0.001",
        "optimizer.betas": "[0.9, 0.95]",
        "hf_token": HIDDEN,
        "store.aws_secret_access_key": HIDDEN,
        "store.uri": "s3://bucket/a",
        "db": "postgresql://db/x",
    }


@pytest.mark.parametrize(
    ("given", "clean"), [("loss@val", "loss_val"), ("R@1 v→a", "R_1 v_a"), ("reward/total", "reward/total")]
)
def test_a_metric_name_becomes_one_that_mlflow_accepts(given, clean):
    assert clean_name(given) == clean


def test_an_artifact_path_cannot_leave_its_run():
    assert clean_path("../../etc/passwd") == "etc/passwd"
    assert clean_path("/") == "unnamed"
    assert clean_path("images/clip 1#250.png") == "images/clip_1_250.png"


def test_credentials_in_a_uri_are_never_shown():
    assert without_credentials("https://me:secret@host:5000/x") == "https://host:5000/x"


def test_a_line_torn_by_a_crash_is_sealed_and_costs_no_other_record(tmp_path):
    journal = Journal(tmp_path)
    journal.metrics(1, {"loss": 3.0})
    journal.close()
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"kind": "metrics", "step": 2, "val')
    assert len(records(tmp_path)) == 1  # the torn line waits
    journal = Journal(tmp_path)
    journal.metrics(2, {"loss": 2.0})
    journal.close()
    found = records(tmp_path)
    assert [r["step"] for r in found if r is not None] == [1, 2]
    assert found.count(None) == 1


def test_steps_repeated_after_a_resume_are_not_doubled(tmp_path):
    journal = Journal(tmp_path)
    for step in (10, 20, 30):
        journal.metrics(step, {"loss": float(step)})
    journal.close()
    journal = Journal(tmp_path)  # restarted from the checkpoint at 10
    for step in (20, 30, 40):
        journal.metrics(step, {"loss": float(step), "lr": 0.1})
    journal.close()
    seen = [(r["step"], key) for r in records(tmp_path) for key in r["values"]]
    assert sorted(seen) == sorted([(s, "loss") for s in (10, 20, 30, 40)] + [(s, "lr") for s in (20, 30, 40)])


def test_values_that_are_not_finite_survive_the_journal_as_valid_json(tmp_path):
    journal = Journal(tmp_path)
    journal.metrics(1, {"loss": float("nan"), "norm": float("inf")})
    journal.close()
    line = (tmp_path / JOURNAL).read_text()
    values = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["values"]
    assert str(float(values["loss"])) == "nan"
    assert float(values["norm"]) == float("inf")


def test_a_full_disk_stops_no_step_and_what_it_refused_follows_in_order(tmp_path, monkeypatch):
    import os

    journal = Journal(tmp_path)
    real_write = os.write
    room = [25]

    def write(descriptor, raw):
        if room[0] <= 0:
            raise OSError(28, "No space left on device")
        taken = real_write(descriptor, raw[: room[0]])
        room[0] -= taken
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        for step in range(5):
            journal.metrics(step, {"loss": 1.0})
        assert journal.num_waiting == 5
    journal.metrics(5, {"loss": 1.0})
    assert journal.num_waiting == 0
    journal.close()
    assert [r["step"] for r in records(tmp_path) if r is not None] == [0, 1, 2, 3, 4, 5]


def test_artifacts_of_one_name_are_kept_apart_and_one_that_the_disk_refuses_is_counted(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.keep_bytes("report/page.html", b"first")
    journal.keep_bytes("report/page.html", b"second")
    (tmp_path / "j" / "artifacts").rename(tmp_path / "gone")
    journal.keep_bytes("report/lost.html", b"third")
    journal.close()
    *kept, lost = records(tmp_path / "j")
    assert [(tmp_path / "gone" / record["stored"]).read_bytes() for record in kept] == [b"first", b"second"]
    assert (lost["kind"], lost["artifact"], journal.num_lost) == ("lost", "report/lost.html", 1)


def test_a_journal_is_closed_only_while_its_last_record_says_so(tmp_path):
    assert not is_closed(tmp_path)
    for _attempt in range(2):
        journal = Journal(tmp_path)
        journal.append("open", params={}, tags={"long": "x" * 10_000})
        assert not is_closed(tmp_path)
        journal.append("close", status="FINISHED")
        journal.close()
        assert is_closed(tmp_path)


def test_each_store_has_its_own_position_and_no_password_is_written(tmp_path):
    journal = Journal(tmp_path)
    journal.metrics(1, {"loss": 1.0})
    journal.metrics(2, {"loss": 1.0})
    journal.close()
    first_end = next(iter(read_lines(tmp_path))).end
    save_shipped(tmp_path, "http://me:secret@a", Shipped(run_id="r", offset=first_end))
    assert num_unshipped(tmp_path, "http://a") == 1
    assert num_unshipped(tmp_path, "http://b") == 2
    assert load_shipped(tmp_path, "http://me:other@a").run_id == "r"
    assert "secret" not in (tmp_path / "shipped.json").read_text()
