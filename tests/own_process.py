"""Scripts that start Ray clusters of their own: in a process of its own, since Ray reads much at its import."""

import os
import secrets
import subprocess
import sys
from pathlib import Path

from pipelines.cluster import LOOPBACK_VARIABLES

ROOT = Path(__file__).parents[1]
LIMIT_S = 560.0


def run_with_own_ray(script: Path, folder: Path, **variables: str) -> None:
    """Run `script FOLDER` to its end with token authentication on loopback, and none of this process's Ray variables.

    AssertionError with what it printed where it fails.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {**LOOPBACK_VARIABLES, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    # Ray lowers its workers to niceness 15, where anything else that runs starves them.
    environment |= {"RAY_worker_niceness": "0", "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
