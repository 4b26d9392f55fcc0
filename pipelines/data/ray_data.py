"""Settings of Ray Data that every stage on it wants."""

import logging


def quiet_ray_data() -> None:
    """Keep Ray Data's bars and info lines out of the output: the stages show their own progress.

    To be called where Ray Data is used, since its import sets its loggers anew.
    """
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
