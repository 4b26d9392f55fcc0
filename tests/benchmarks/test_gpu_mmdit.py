import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_mmdit
from models.mmdit import SIZES, MMDiT

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler does is tested beside models/block_runs.py; here it would only take minutes."""
    monkeypatch.setattr(MMDiT, "compile_blocks", lambda _: None)


def test_a_report_says_device_day_rates_and_every_way_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_mmdit, "WARM_UP", 1)
    monkeypatch.setattr(gpu_mmdit, "NUM_STEPS", 2)
    content = json.loads(json.dumps(gpu_mmdit.report("tiny", batch=2, device=CPU, repeats=1, matrix_size=64)))
    assert content["device"] == "cpu"
    assert content["bf16 matrix TFLOP/s"] > 0
    training = [row for row in content["rows"] if row["what"] == "training step"]
    ways = {(row["checkpoint"], row["compile"]) for row in training}
    assert ways == {(a, b) for a in (False, True) for b in (False, True)}
    for row in content["rows"]:
        assert row["samples/s"] == pytest.approx(row["batch"] / row["seconds"])
        assert row["share of matrix rate"] == pytest.approx(row["TFLOP/s"] / content["bf16 matrix TFLOP/s"])
    sampler = next(row for row in content["rows"] if row["what"].startswith("sampler"))
    assert sampler["batch"] == 1


def test_the_training_step_learns_its_batch() -> None:
    torch.manual_seed(0)
    network = MMDiT(SIZES["tiny"]).train()
    step = gpu_mmdit.training_step(network, batch=2)
    losses = [step().item() for _ in range(60)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_arithmetic_is_that_of_a_known_product() -> None:
    assert gpu_mmdit.arithmetic(lambda: torch.ones(3, 5) @ torch.ones(5, 7)) == 2 * 3 * 5 * 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_without_cuda_one_line_says_so_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_mmdit.main(["--json", str(tmp_path / "report.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
