"""How often a unit has been begun in one run, so that rows which kill every worker end in a message and not in a loop.

Ray starts a dead worker again without end. The count lies beside the parts, because the worker that knew it is dead.
"""

import json

from pipelines.data.storage import Folder
from pipelines.errors import EnvironmentFailed

ATTEMPTS = "attempts"
MAX_ATTEMPTS = 6


def begin(folder: Folder, unit_id: str, run_id: str) -> None:
    """Count one more beginning of a unit in the run `run_id`; another run counts from one again.

    Raises:
        EnvironmentFailed: the unit was begun `MAX_ATTEMPTS` times in this run and its worker died each time.
    """
    name = f"{ATTEMPTS}/{unit_id}.json"
    try:
        before = json.loads(folder.read_bytes(name))
        count = before["count"] if before["run"] == run_id else 0
    except FileNotFoundError:
        count = 0
    if count >= MAX_ATTEMPTS:
        raise EnvironmentFailed(
            f"{folder.uri}: unit {unit_id} was begun {count} times and its worker died or hung each time; look for "
            "the cause in the workers' logs (memory?), then run the same command again"
        )
    folder.write_bytes(name, json.dumps({"run": run_id, "count": count + 1}).encode())
