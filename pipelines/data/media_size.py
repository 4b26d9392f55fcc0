"""Whether a picture that cannot be decoded declares, inside its own stream, more pixels than are allowed.

Containers say a size, which is checked before anything is decoded; the stream's own headers may say another, and the
decoder refuses them with the error of any damaged picture. What tells the two apart is what it logs.
"""

import contextlib
import errno
import re
from collections.abc import Callable

import av
import av.error
from av.container import InputContainer

from pipelines.errors import MediaError

SIZE_REFUSED = re.compile(r"Picture size (\d+x\d+) (?:is invalid|exceeds)")
"""The two lines of FFmpeg's `av_image_check_size2`."""
LOOKED_AT = 8
"""Packets: parameter sets and sizes come first."""


def refused_size(reopen: Callable[[], InputContainer]) -> str | None:
    """`WxH` where the decoder of the first video stream refuses its size, else None; decodes a few packets anew."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture() as said:
            _decode_start(reopen)
            # An error that follows would quote what was logged here as its own.
            with contextlib.suppress(av.FFmpegError):
                av.error.err_check(-errno.EINVAL)
    finally:
        av.logging.set_level(level)
    found = (SIZE_REFUSED.search(message) for _, _, message in said)
    return next((match[1] for match in found if match), None)


def _decode_start(reopen: Callable[[], InputContainer]) -> None:
    try:
        with reopen() as container:
            for packet, _ in zip(container.demux(container.streams.video[:1]), range(LOOKED_AT), strict=False):
                try:
                    packet.decode()
                except av.FFmpegError:
                    continue
    except (av.FFmpegError, MediaError):
        return
