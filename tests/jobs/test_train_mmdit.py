"""What the three jobs that train a policy say of adapters and of how the network is run."""

import pytest

from jobs import cli, rpo_rounds, train_mmdit, train_rpo
from pipelines.errors import InputError
from pipelines.training.options import Execution, LoRA, PolicyTrainingOptions

JOBS: dict[str, tuple[type[PolicyTrainingOptions], list[str]]] = {
    "train_mmdit": (train_mmdit.Options, ["--features=/f", "--out=/o"]),
    "train_rpo": (train_rpo.Options, ["--policy=/p", "--pairs=/q", "--out=/o"]),
    "rpo_rounds": (rpo_rounds.Options, ["--policy=/p", "--reward=/r", "--features=/f", "--out=/o"]),
}


def parsed(job: str, *flags: str) -> PolicyTrainingOptions:
    options_type, required = JOBS[job]
    return cli.parse(job, options_type, [*required, *flags])


@pytest.mark.parametrize("job", JOBS)
def test_every_weight_is_trained_unless_a_rank_is_given(job: str) -> None:
    assert parsed(job).lora() is None
    assert parsed(job).execution() == Execution()
    assert parsed(job, "--lora-rank", "8").lora() == LoRA(rank=8, alpha=8.0)
    assert parsed(job, "--lora-rank", "8", "--lora-alpha", "16").lora() == LoRA(rank=8, alpha=16.0)
    both = parsed(job, "--activation-checkpointing", "--compile")
    assert both.execution() == Execution(activation_checkpointing=True, compile=True)


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--lora-rank=0"], "--lora-rank must be at least 1, got 0"),
        (["--lora-alpha=8"], "--lora-alpha 8 scales adapters: give --lora-rank too"),
        (["--lora-rank=8", "--lora-alpha=-1"], "--lora-alpha must be positive, got -1.0"),
        (["--lora-rank=8", "--lora-alpha=nan"], "--lora-alpha must be positive, got nan"),
        (["--lora-rank=many"], "lora-rank"),
    ],
)
def test_adapters_that_cannot_be_are_one_clear_line(job: str, flags: list[str], line: str) -> None:
    with pytest.raises(InputError, match=line) as caught:
        parsed(job, *flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("job", JOBS)
def test_the_options_written_beside_an_artifact_parse_back_equal(job: str) -> None:
    options = parsed(job, "--lora-rank", "8", "--compile")
    section = cli.yaml.safe_load(cli.to_yaml(job, options))[job]
    assert cli.parse(job, JOBS[job][0], cli.flatten(section)) == options
