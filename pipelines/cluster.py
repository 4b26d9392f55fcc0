"""Connection to Ray: a running cluster when there is one, else a local one on loopback with token auth."""

import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.errors import EnvironmentFailed, first_line

LOOPBACK_VARIABLES = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Read on Linux too: binds every service of a local cluster to 127.0.0.1."""
LOCAL_OBJECT_STORE_BYTES = 512 * 2**20


@contextmanager
def connect(num_cpus: int | None = None) -> Iterator[None]:
    """Be connected to Ray inside the block.

    An open connection is reused and left open. `RAY_ADDRESS` (set by `ray job submit` too) names a running cluster;
    without it a local cluster of `num_cpus` (default: the machine's) starts and ends with the block.

    Raises:
        EnvironmentFailed: no cluster answers, or the local one does not come up.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        # Before Ray is imported: it reads them once.
        for name, value in LOOPBACK_VARIABLES.items():
            os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    _quiet()
    try:
        _init(address, num_cpus)
    except Exception as error:  # A bare Exception is what Ray raises where a node does not come up in time.
        ray.shutdown()
        where = f"the cluster at RAY_ADDRESS={address}" if address else "a local cluster"
        raise EnvironmentFailed(
            f"Ray: {where} did not come up ({first_line(error)}); see that the machine is not overloaded and the "
            "address is right, then run the same command again"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _init(address: str | None, num_cpus: int | None) -> None:
    import ray

    if address:
        ray.init(address=address, logging_level=logging.ERROR)
    else:
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            # A token of its own: Ray would else leave one in the home folder, which later clusters pick up unasked.
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            logging_level=logging.ERROR,
            log_to_driver=sys.stderr.isatty(),
        )


def _quiet() -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger("ray.train").setLevel(logging.ERROR)


def cluster_cpus() -> float:
    """CPUs of the connected cluster."""
    import ray

    return float(ray.cluster_resources().get("CPU", 1.0))


def cluster_gpus() -> float:
    """GPUs of the connected cluster."""
    import ray

    return float(ray.cluster_resources().get("GPU", 0.0))
