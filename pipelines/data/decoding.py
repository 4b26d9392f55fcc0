"""Decoding in a disposable child process: a file that crashes, hangs or exhausts the decoder costs one child.

The child (`decode_child.py`) imports only PyAV and numpy, holds no secrets in its environment, has limits on CPU,
memory, open files and written bytes, may use no network, start no program and change no file (`child_isolation.py`),
and is replaced after a crash, a hang or a number of clips. Requests are JSON
lines on its stdin; answers are a JSON header and raw arrays on its stdout, and are not trusted: their sizes follow
from the request, or the child counts as crashed.
"""

import contextlib
import dataclasses
import json
import math
import operator
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pipelines.data.window import DecodedWindow, MediaInfo, SourceFormat, WindowRequest
from pipelines.errors import MediaError

MAX_ATTEMPTS = 2
"""A clip that crashes or hangs the child is tried once more in a fresh one: the first death may be another's doing."""
RETRIED_REASONS = frozenset({"decoder_crash", "timeout"})
MAX_HEADER_BYTES = 1 << 20
MAX_RATE_HZ = 192_000
MAX_SOURCE_NUMBER = 10_000_000
PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    """What one clip may cost before it is given up."""

    timeout_s: float = 60.0
    """Wall time, and CPU time, of one clip."""
    memory_bytes: int = 4 << 30
    """Address space of the child."""
    clips_per_child: int = 256
    """A child is replaced after so many clips, against slow leaks."""


class _ChildDied(Exception):
    """The child ended, or said what it must not say."""


def child_command(limits: DecodeLimits) -> list[str]:
    """Command line of a decode child."""
    arguments = json.dumps(dataclasses.asdict(limits))
    return [sys.executable, "-P", "-m", "pipelines.data.decode_child", arguments]


class Decoder:
    """A decode child and the policy around it; use from one thread at a time, close when done."""

    def __init__(self, limits: DecodeLimits | None = None, command: Sequence[str] | None = None) -> None:
        """`command` starts another child program that speaks the same protocol."""
        self.limits = limits or DecodeLimits()
        self._command = list(command) if command is not None else child_command(self.limits)
        self._child: subprocess.Popen[bytes] | None = None
        self._served = 0

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def child_pid(self) -> int | None:
        """Process id of the living child, if there is one."""
        return None if self._child is None else self._child.pid

    def decode(self, path: str | Path, request: WindowRequest) -> DecodedWindow:
        """Decode one window of a local file.

        Raises:
            MediaError: why the clip cannot be used, `decoder_crash` and `timeout` among the reasons.
        """
        message = {"do": "read_window", "path": os.fspath(path), "request": dataclasses.asdict(request)}
        header, payload = self._ask(message, request)
        return _window(header, payload, request)

    def probe(self, path: str | Path, max_pixels: int) -> MediaInfo:
        """What the container of a local file says of itself.

        Raises:
            MediaError: it cannot be opened.
        """
        header, _ = self._ask({"do": "probe", "path": os.fspath(path), "max_pixels": max_pixels}, None)
        try:
            return MediaInfo(**header["info"])
        except (KeyError, TypeError) as error:
            raise MediaError("decoder_crash", f"the decoder's answer is not understood: {error!r}") from error

    def isolation(self) -> dict[str, bool]:
        """What the kernel says of the child: `filter`, whether calls are forbidden to it, and `no_new_privileges`.

        Raises:
            MediaError: no child answers.
        """
        header, _ = self._ask({"do": "isolation"}, None)
        return {str(name): bool(value) for name, value in header.get("isolation", {}).items()}

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for stream in (self._child.stdin, self._child.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
            self._child = None

    def _ask(self, message: Mapping[str, Any], request: WindowRequest | None) -> tuple[dict[str, Any], memoryview]:
        problem = MediaError("decoder_crash", "not tried")
        for _ in range(MAX_ATTEMPTS):
            try:
                return self._exchange(message, request)
            except _ChildDied as death:
                problem = MediaError("decoder_crash", f"the decoder died {MAX_ATTEMPTS} times: {death}")
            except TimeoutError:
                problem = MediaError("timeout", f"more than {self.limits.timeout_s:g} s, {MAX_ATTEMPTS} times")
            self.close()
        raise problem

    def _exchange(self, message: Mapping[str, Any], request: WindowRequest | None) -> tuple[dict[str, Any], memoryview]:
        child = self._ready_child()
        deadline = time.monotonic() + self.limits.timeout_s
        try:
            os.write(_descriptor(child.stdin), json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise _ChildDied(f"it takes no request: {error}") from error
        (size,) = struct.unpack("<I", self._receive(4, deadline))
        if size > MAX_HEADER_BYTES:
            raise _ChildDied(f"it announces a header of {size} bytes")
        try:
            header = json.loads(bytes(self._receive(size, deadline)))
        except ValueError as error:
            raise _ChildDied("its answer is not JSON") from error
        try:
            if "reason" in header:
                raise MediaError(str(header["reason"]), str(header["detail"]))
            payload_bytes = _payload_bytes(header, request)
        except (KeyError, TypeError, OverflowError) as error:
            raise _ChildDied(f"its answer is not understood: {error!r}") from error
        return header, self._receive(payload_bytes, deadline)

    def _ready_child(self) -> subprocess.Popen[bytes]:
        if self._served >= self.limits.clips_per_child:
            self.close()
        if self._child is None:
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,
                bufsize=0,
            )
            self._served = 0
        self._served += 1
        return self._child

    def _receive(self, size: int, deadline: float) -> memoryview:
        """Exactly `size` bytes from the child.

        Raises:
            TimeoutError: the deadline (monotonic seconds) passed.
            _ChildDied: the child's output ended.
        """
        child = self._ready_to_read()
        descriptor = _descriptor(child.stdout)
        buffer = memoryview(bytearray(size))
        filled = 0
        while filled < size:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([descriptor], [], [], left_s)[0]:
                raise TimeoutError
            count = os.readv(descriptor, [buffer[filled:]])
            if count == 0:
                raise _ChildDied(_how_it_ended(child))
            filled += count
        return buffer

    def _ready_to_read(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            raise _ChildDied("it is gone")
        return self._child


def _descriptor(stream: Any) -> int:
    return stream.fileno()


def _how_it_ended(child: subprocess.Popen[bytes]) -> str:
    try:
        code = child.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return "it closed its output"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _audio_length(header: Mapping[str, Any], request: WindowRequest) -> int:
    rate_hz, margin = operator.index(header["audio_rate_hz"]), operator.index(header["audio_margin"])
    if not request.audio_samples:
        return 0
    if not (0 < rate_hz <= MAX_RATE_HZ and 0 <= margin <= rate_hz):
        raise _ChildDied(f"it announces sound at {rate_hz} Hz with a margin of {margin}")
    return math.ceil(request.audio_samples * rate_hz / request.audio_rate_hz) + 2 * margin


def _payload_bytes(header: Mapping[str, Any], request: WindowRequest | None) -> int:
    if request is None:
        return 0
    if not 0 <= float(header["valid_s"]) <= request.duration_s:
        raise _ChildDied(f"it says that {header['valid_s']} of {request.duration_s} s are real")
    frames = sum(grid.num_frames * grid.size_px**2 * 3 for grid in request.grids)
    return frames + 4 * _audio_length(header, request)


def _source_format(found: Mapping[str, Any]) -> SourceFormat:
    """Numbers as they have to be, from a child that is not trusted; what is no sane one is unknown."""
    whole = {
        name: value if isinstance(value := found.get(name), int) and 0 < value < MAX_SOURCE_NUMBER else None
        for name in ("width", "height", "rate_hz", "channels")
    }
    fps = found.get("fps")
    return SourceFormat(**whole, fps=fps if isinstance(fps, float) and 0 < fps < MAX_SOURCE_NUMBER else None)


def _window(header: Mapping[str, Any], payload: memoryview, request: WindowRequest) -> DecodedWindow:
    frames, offset = [], 0
    for grid in request.grids:
        shape = (grid.num_frames, grid.size_px, grid.size_px, 3)
        size = math.prod(shape)
        frames.append(np.frombuffer(payload, np.uint8, size, offset).reshape(shape))
        offset += size
    audio = None
    if request.audio_samples:
        # Copied, because the frames before it need not leave it aligned.
        audio = np.frombuffer(bytes(payload[offset:]), np.float32)
    return DecodedWindow(
        frames=tuple(frames),
        audio=audio,
        audio_rate_hz=int(header["audio_rate_hz"]),
        audio_margin=int(header["audio_margin"]),
        valid_s=float(header["valid_s"]),
        source=_source_format(header["source"]),
    )
