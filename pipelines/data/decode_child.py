"""The decode child: gives up all rights it can do without, then answers requests on stdin until it ends.

See `decoding.py` for the protocol, `child_isolation.py` for the rights.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import resource
import struct
import sys
import time
from typing import Any

from pipelines.data.child_isolation import forbid, isolation

MAX_OPEN_FILES = 32
PIPE_BYTES = 1 << 20
"""What Linux gives to a user without rights."""


def limit_resources(memory_bytes: int, cpu_s: float) -> None:
    """Limit address space, total CPU time, open files; forbid core dumps and writing to files at all."""
    for kind, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(cpu_s), math.ceil(cpu_s)))


def limit_clip(cpu_s: float) -> None:
    """Let the kernel end this process when the clip at hand has used `cpu_s` seconds of CPU."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = min(math.ceil(time.process_time() + cpu_s) + 1, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def answer(message: dict[str, Any]) -> tuple[dict[str, Any], list[memoryview]]:
    """(header, arrays as bytes) for one request; what is wrong with the file is told in the header."""
    from pipelines.data import media
    from pipelines.data.window import request_from_dict
    from pipelines.errors import MediaError

    try:
        with open(message["path"], "rb") as file:  # noqa: PTH123 - a path may hold undecodable bytes
            if message["do"] == "probe":
                return {"info": dataclasses.asdict(media.probe(file, message["max_pixels"]))}, []
            window = media.read_window(file, request_from_dict(message["request"]))
    except MediaError as error:
        return {"reason": error.reason, "detail": error.detail}, []
    except OSError as error:
        return {"reason": "missing", "detail": f"cannot be read: {error.strerror}"}, []
    except MemoryError:
        return {"reason": "too_large", "detail": "decoding needs more memory than is allowed"}, []
    except Exception as error:
        return {"reason": "decoder_crash", "detail": f"{type(error).__name__}: {error}"}, []
    header = {
        "valid_s": window.valid_s,
        "audio_rate_hz": window.audio_rate_hz,
        "audio_margin": window.audio_margin,
        "source": dataclasses.asdict(window.source),
    }
    arrays = [*window.frames, *([] if window.audio is None else [window.audio])]
    return header, [array.data.cast("B") for array in arrays]


def main() -> None:
    """Serve requests until stdin ends or nobody reads the answers."""
    limits = json.loads(sys.argv[1])
    limit_resources(limits["memory_bytes"], (limits["timeout_s"] + 2) * (limits["clips_per_child"] + 1))
    # Where the kernel refuses the filter, decoding goes on with the limits alone; `jobs/doctor.py` says so.
    forbid()
    # Nothing but answers may reach the parent, whatever a library prints.
    output = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    enlarge_pipe(output.fileno())
    for line in sys.stdin.buffer:
        limit_clip(limits["timeout_s"])
        message = json.loads(line)
        header, arrays = ({"isolation": isolation()}, []) if message["do"] == "isolation" else answer(message)
        encoded = json.dumps(header).encode()
        try:
            write_all(output.fileno(), memoryview(struct.pack("<I", len(encoded)) + encoded))
            for array in arrays:
                write_all(output.fileno(), array)
        except BrokenPipeError:
            return


def enlarge_pipe(descriptor: int) -> None:
    """A pipe that takes more at once wakes its two ends less often; the kernel may refuse."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def write_all(descriptor: int, content: memoryview) -> None:
    """Write every byte to a pipe."""
    while content:
        content = content[os.write(descriptor, content) :]


if __name__ == "__main__":
    main()
