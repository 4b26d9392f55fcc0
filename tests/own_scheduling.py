"""Keeps the scheduling of this process from an encoder that changes it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def own_scheduling() -> Iterator[None]:
    """Inside, a library may change how this thread is scheduled; afterwards it is as before.

    SVT-AV1, opened by root, gives the thread that opens it SCHED_FIFO at 99, and every thread and process that it
    starts later inherits that. Two threads of gloo that wait for a lock in a loop then keep two cores for themselves
    for ever: those they wait for never run, nor do those that should end them.
    """
    policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameter)
