"""The average of the trained weights that is validated and exported in their place, where the options ask for one."""

from contextlib import AbstractContextManager

from models.ema import WeightAverage, exponential_decay, gamma_of_width, power_decay
from pipelines.training.engine import Engine
from pipelines.training.options import TrainingOptions


class Average:
    """An exponential or power-function average over the steps of an engine, or none."""

    def __init__(self, engine: Engine, options: TrainingOptions) -> None:
        self._engine, self._options = engine, options
        self.weights: WeightAverage | None = None
        """None where no average is kept."""
        if options.ema_decay is not None or options.ema_width is not None:
            with engine.whole_weights(trained_alone=True):
                self.weights = WeightAverage(engine.trainable)

    @property
    def num_updates(self) -> int:
        """Steps that are in it."""
        return 0 if self.weights is None else self.weights.num_updates

    def update(self) -> None:
        """Take the weights of a step that was applied."""
        if self.weights is not None:
            with self._engine.whole_weights(trained_alone=True):
                self.weights.update(self._engine.trainable, self._decay(self.weights.num_updates + 1))

    def in_place(self) -> AbstractContextManager[None]:
        """Inside, the trained parameters are whole and hold the average; their own values where there is none."""
        if self.weights is None:
            return self._engine.whole_weights()
        return self._engine.replaced_weights(self.weights.copy_to)

    def _decay(self, update: int) -> float:
        if self._options.ema_width is not None:
            return power_decay(update, gamma_of_width(self._options.ema_width))
        return exponential_decay(update, self._options.ema_decay or 0.0)
