"""Train a policy on preference pairs: policy M_k + pairs -> policy M_{k+1}, or the equal-steps control."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jobs import cli
from pipelines.training.gpus import GpuName
from pipelines.training.options import PolicyTrainingOptions
from pipelines.training.worker_range import NumWorkers

if TYPE_CHECKING:
    from pipelines.training.workers import WorkerGroup


@dataclass(frozen=True, kw_only=True)
class Options(PolicyTrainingOptions):
    """Flow-matching DPO on the kept pairs, against the policy the round starts from; or its control."""

    policy: cli.StoragePath
    """Policy to train on from; its frozen copy is the reference."""
    pairs: cli.StoragePath
    """Pairs dataset of this round."""
    out: cli.StoragePath
    """Folder of the new policy."""
    objective: Literal["dpo", "winner_fm"] = "dpo"
    """winner_fm is the control: same pairs, winners, order, steps and noise, no preference term, no reference."""
    kappa: float = 200.0
    """beta / 2 on mean-reduced errors; one knob together with --lr."""
    fm_weight: float = 1.0
    """Weight of the winner's flow-matching error."""
    divide_by_kappa: bool = False
    """Divide the preference loss by kappa, so that kappa shapes the loss and does not scale its gradient."""
    label_smoothing: float = 0.0
    """Probability that a pair's label is wrong."""
    loser_clip: float | None = None
    """No gradient pushes the loser's error beyond so much above the reference's (0.05 is a start)."""
    sdpo_mu: float | None = None
    """Weaken the loser's gradient so that the winner's error does not rise (Diffusion-SDPO; 0.5 to 0.9)."""
    strict_guards: bool = False
    """Stop at an alarm of loser-driven collapse, with the weights of that step; otherwise it is only reported."""
    probe_every: int = 25
    """Steps between measurements of the gradients of both loss parts (one more forward, two backward); 0: never.
    Not under ZeRO-3."""
    num_workers: NumWorkers = 2
    """Ray Train workers; a range, as 2:8, goes on with those that are there; 0 trains in this process without Ray."""
    gpus_per_worker: Literal[0, 1] | None = None
    """GPUs of a worker; None: one where the cluster has so many now. Give 1 on a cluster that grows from nothing."""
    steps: int = 860
    """Optimizer steps of the round."""
    batch_size: int = 48
    """Pairs a step, over all workers and accumulation steps."""
    lr: float = 5e-6
    """Peak learning rate."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly."""
    weight_decay: float = 1e-2
    """AdamW's decoupled weight decay."""
    dry_run: bool = False
    """Print the memory that a worker would need under each ZeRO stage, with --gpu the hours too, and touch nothing."""
    gpu: GpuName | None = None
    """With --dry-run: the workers' GPU, to say what fits it and how long the training would take."""
    gpu_gib: float | None = None
    """With --dry-run: memory of a GPU in GiB, to say what fits it; None: that of --gpu."""


def main(options: Options, group: "WorkerGroup | None" = None) -> int:
    """Run the stage, in `group` if there is one; or print what it needs."""
    if options.dry_run:
        return _print_needs(options)
    from models.preference import PreferenceLossConfig
    from pipelines.training.stages import Launching, train_rpo

    train_rpo(
        policy=options.policy,
        pairs=options.pairs,
        out=options.out,
        options=options.training(),
        loss=PreferenceLossConfig(
            kappa=options.kappa,
            fm_weight=options.fm_weight,
            divide_by_kappa=options.divide_by_kappa,
            label_smoothing=options.label_smoothing,
            loser_clip=options.loser_clip,
        ),
        launching=Launching(
            num_workers=options.num_workers,
            gpus_per_worker=options.gpus_per_worker,
            group=group,
            execution=options.execution(),
            options_yaml=cli.to_yaml("train_rpo", options),
        ),
        kind=options.objective,
        lora=options.lora(),
        sdpo_mu=options.sdpo_mu,
        strict_guards=options.strict_guards,
        probe_every=options.probe_every,
    )
    return 0


def _print_needs(options: Options) -> int:
    from pipelines.training.dry_run import dry_run_lines, policy_size

    lines = dry_run_lines(
        policy_size(options.policy),
        options,
        num_workers=options.num_workers,
        reference=options.objective == "dpo",
        gpu=options.gpu,
        gpu_gib=options.gpu_gib,
    )
    print(*lines, sep="\n")
    return 0


if __name__ == "__main__":
    cli.run("train_rpo", Options, main)
