"""The MLflow run of a stage: its options as parameters, its fingerprint and its inputs' as tags."""

from pipelines.stage import StageContext
from pipelines.tracking import Tracker, open_tracker


def stage_tracker(context: StageContext) -> Tracker:
    """Return the MLflow run of a stage, a child of the launch around it."""
    return open_tracker(
        context.out,
        context.name,
        params=context.config,
        tags={"fingerprint": context.fingerprint, **{f"input.{k}": v for k, v in context.inputs.items()}},
    )
