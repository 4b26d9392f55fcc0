"""The demo's numbers under their fixed names, and the table that it prints; all measured on the test split."""

from collections.abc import Mapping
from typing import Any

from pipelines.evaluation.bootstrap import Estimate
from pipelines.evaluation.evaluate import read_scores
from pipelines.evaluation.reward_check import read_gates
from pipelines.evaluation.summary import Summary, summarise
from pipelines.evaluation.tables import align

MAX_F1_LOSS = 0.02
"""The demo's gate: no onset F1 may fall by more than this against M_0."""
REPORTED = {
    "reward": "reward",
    "reward_semantic": "semantic",
    "reward_temporal": "temporal",
    "f1": "f1",
    "class_f1": "class_f1",
    "frechet_codec": "frechet_codec",
    "frechet": "frechet",
    "diversity": "diversity",
}
"""Metric of the score table -> its name in summary.json."""
BARS = {
    "detector_f1_gt": 0.97,
    "detector_f1_inverted": 0.97,
    "cavp_r1_v2a": 0.85,
    "cavp_r1_a2v": 0.85,
    "cavp_shift_acc": 0.95,
    "m0_f1": 0.65,
    "m0_class_f1": 0.50,
}
UPPER_BARS = {"m0_shuffled_f1": 0.25, "m0_shuffled_class_f1": 0.10}


def demo_summary(out: str, *, rounds: int, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Gather the numbers of a finished demo.

    Intervals of `m<k>_*` and `control<K>_*` are those of the values; `*_minus_m0`, and `*_minus_control<K>` of the last
    round, are paired differences. `seconds` are those of the steps that ran in one attempt; of others nobody knows.
    """
    models = ["m0", *(f"m{k + 1}" for k in range(rounds)), f"control{rounds}"]
    names = ["ground_truth", "inverted", "shuffled", *models]
    alone = {name: read_scores(f"{out}/scores/{name}")[0] for name in names}
    scores = {name: one.beside_codec(alone["inverted"]) for name, one in alone.items()}
    table = summarise(scores, baseline="m0")
    last, control = models[-2:]
    beside = summarise({name: scores[name] for name in (control, last)}, baseline=control)
    gates = read_gates(f"{out}/gates")
    values = {name: gate["value"] for name, gate in gates["gates"].items()}
    shifts = [value for name, value in values.items() if name.startswith("shift_acc_")]
    found: dict[str, Any] = {
        "detector_f1_gt": _value(table, "ground_truth", "f1"),
        "detector_f1_inverted": _value(table, "inverted", "f1"),
        "cavp_r1_v2a": values["r1_v2a"],
        "cavp_r1_a2v": values["r1_a2v"],
        "cavp_shift_acc": min(shifts),
        "gates": gates["gates"],
    }
    ranking = gates["ranking"]
    found |= {name: ranking[name] for name in ("reward_within_clip_rho", "bon_1", "bon_2", "bon_5", "oracle_5")}
    found |= {name: ranking[name] for name in ("truth_above_worst", "truth_above_best")}
    found |= {f"m0_shuffled_{name}": _value(table, "shuffled", name) for name in ("f1", "class_f1")}
    for model in models:
        for metric, name in REPORTED.items():
            found |= _with_interval(f"{model}_{name}", table.estimates[model].get(metric))
            if model != "m0":
                found |= _with_interval(f"{model}_{name}_minus_m0", table.differences[model].get(metric))
    for metric, name in REPORTED.items():
        found |= _with_interval(f"{last}_{name}_minus_{control}", beside.differences[last].get(metric))
    found |= {f"seconds_{name}": value for name, value in seconds.items()}
    found["seconds_total"] = round(sum(seconds.values()), 1)
    found["gate_passed"] = all(
        found[f"{model}_{name}"] >= found[f"m0_{name}"] - MAX_F1_LOSS
        for model in models[1:-1]
        for name in ("f1", "class_f1")
    )
    return found


def demo_table(summary: Mapping[str, Any]) -> str:
    """The summary as text: checks with their bars, then the models side by side, then the seconds."""
    rows = [["measured on the test split", "value", "wanted", ""]]
    for bars, sign in ((BARS, ">="), (UPPER_BARS, "<=")):
        for name, bar in bars.items():
            value = summary[name]
            reached = value >= bar if sign == ">=" else value <= bar
            rows.append([name, f"{value:.3f}", f"{sign} {bar:g}", "" if reached else "NOT REACHED"])
    ranking = ("reward_within_clip_rho", "bon_1", "bon_2", "bon_5", "oracle_5", "truth_above_worst")
    rows += [[name, _number(summary[name]), "", ""] for name in ranking]
    models = [name.removesuffix("_f1") for name in summary if name.endswith("_f1") and f"{name}_lo" in summary]
    models = [name for name in models if not name.endswith("_class") and "minus" not in name]
    table = [["model", *REPORTED.values()]]
    table += [[model, *(_cell(summary, f"{model}_{name}") for name in REPORTED.values())] for model in models]
    changes = [["minus M_0 (paired)", *REPORTED.values()]]
    changes += [
        [model, *(_cell(summary, f"{model}_{name}_minus_m0") for name in REPORTED.values())] for model in models[1:]
    ]
    last, control = models[-2:]
    beside = [[f"minus {control} (paired)", *REPORTED.values()]]
    beside += [[last, *(_cell(summary, f"{last}_{name}_minus_{control}") for name in REPORTED.values())]]
    seconds = [[n.removeprefix("seconds_"), f"{v:.0f} s"] for n, v in summary.items() if n.startswith("seconds_")]
    gate = "passed" if summary["gate_passed"] else "FAILED"
    verdict = f"gate: no F1 falls by more than {MAX_F1_LOSS} against M_0: {gate}"
    blocks = (align(rows), align(table), align(changes), align(beside), align(seconds), [verdict])
    return "\n\n".join("\n".join(block) for block in blocks)


def _value(table: Summary, label: str, metric: str) -> float:
    return table.estimates[label][metric].value


def _with_interval(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    if estimate is None:
        return {name: None, f"{name}_lo": None, f"{name}_hi": None}
    return {name: estimate.value, f"{name}_lo": estimate.lo, f"{name}_hi": estimate.hi}


def _cell(summary: Mapping[str, Any], name: str) -> str:
    value = summary[name]
    return "-" if value is None else f"{value:.3f} [{summary[f'{name}_lo']:.3f}, {summary[f'{name}_hi']:.3f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
