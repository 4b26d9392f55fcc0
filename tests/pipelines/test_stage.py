from pathlib import Path

import pytest

from pipelines.errors import StageConflict
from pipelines.stage import StageContext, fingerprint_of, plan_stage, run_stage


def stage(out: Path, calls: list[str], config: dict | None = None, fail: bool = False, features: str = "f1") -> str:
    def body(context: StageContext) -> None:
        calls.append("resumed" if context.resumed else "fresh")
        context.folder.write_bytes("part", b"x")
        if fail:
            raise KeyboardInterrupt
        context.finish({"kind": "report", "files": []})

    lines: list[str] = []
    outcome = run_stage(
        name="demo",
        config=config or {"steps": 3},
        inputs={"features": features},
        out=str(out),
        body=body,
        say=lines.append,
    )
    assert lines[0].startswith(f"demo: {outcome}, ")
    return outcome


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_four_outcomes_run_resume_skip_and_refuse(tmp_path: Path) -> None:
    calls: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "a", calls, fail=True)
    assert stage(tmp_path / "a", calls) == "resume"
    assert stage(tmp_path / "a", calls) == "skip"
    assert stage(tmp_path / "b", calls) == "run"
    assert calls == ["fresh", "resumed", "fresh"]
    with pytest.raises(StageConflict, match=r"steps: 3 there, 4 asked.*another --out"):
        stage(tmp_path / "a", calls, {"steps": 4})
    with pytest.raises(StageConflict, match='features: "f1" there, "f2" asked'):
        stage(tmp_path / "a", calls, features="f2")
    assert len(calls) == 3


def test_unfinished_work_of_other_settings_is_refused_and_left_alone(tmp_path: Path) -> None:
    calls: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "a", calls, fail=True)
    before = files_of(tmp_path / "a")
    with pytest.raises(StageConflict, match="steps"):
        stage(tmp_path / "a", calls, {"steps": 4})
    assert files_of(tmp_path / "a") == before


def test_a_folder_with_foreign_files_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(StageConflict, match=r"holiday\.jpg"):
        stage(tmp_path, [])
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.jpg"]


def test_the_fingerprint_sees_options_inputs_version_and_stage_but_not_their_order() -> None:
    base = fingerprint_of("s", {"a": 1, "b": 2}, {"x": "1"}, 1)
    assert fingerprint_of("s", {"b": 2, "a": 1}, {"x": "1"}, 1) == base
    others = [("t", {"a": 1, "b": 2}, {"x": "1"}, 1), ("s", {"a": 1, "b": 3}, {"x": "1"}, 1)]
    others += [("s", {"a": 1, "b": 2}, {"x": "2"}, 1), ("s", {"a": 1, "b": 2}, {"x": "1"}, 2)]
    assert base not in {fingerprint_of(*other) for other in others}


def test_a_plan_says_what_would_happen_and_touches_nothing(tmp_path: Path) -> None:
    arguments = {"name": "demo", "config": {"steps": 3}, "inputs": {"features": "f1"}, "out": str(tmp_path / "a")}
    assert plan_stage(**arguments) == "run"
    assert not (tmp_path / "a").exists()
    stage(tmp_path / "a", [])
    assert plan_stage(**arguments) == "skip"
    assert plan_stage(**arguments | {"config": {"steps": 4}}) == "refuse"


def test_two_processes_finishing_one_artifact_leave_the_first_result(tmp_path: Path) -> None:
    def slow_twin(context: StageContext) -> None:
        twin = StageContext(
            name="demo",
            folder=context.folder,
            fingerprint=context.fingerprint,
            config=context.config,
            inputs=context.inputs,
            resumed=False,
            version=1,
        )
        twin.finish({"kind": "report", "files": [], "who": "first"})
        context.finish({"kind": "report", "files": [], "who": "second"})

    with pytest.raises(StageConflict, match="another process"):
        run_stage(name="demo", config={}, inputs={}, out=str(tmp_path / "a"), body=slow_twin, say=lambda line: None)
    assert '"who": "first"' in (tmp_path / "a/manifest.json").read_text()
