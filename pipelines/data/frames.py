"""The JPEG frames of a row, from pixels and back."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipelines.errors import MediaError

JPEG_QUALITY = 90


def decode_frames(jpegs: Sequence[bytes]) -> np.ndarray:
    """JPEG files of one size -> uint8 [T, H, W, 3] RGB.

    Raises:
        MediaError: there are none, one is no JPEG or is cut off, or their sizes differ.
    """
    if not jpegs:
        raise MediaError("empty", "the row has no frames")
    frames = [_decode(content, index) for index, content in enumerate(jpegs)]
    if len({frame.shape for frame in frames}) > 1:
        raise MediaError("not_media", f"frames have sizes {sorted({frame.shape[:2] for frame in frames})}")
    return np.stack(frames)


def _decode(content: bytes, index: int) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise MediaError("not_media", f"frame {index} is not a JPEG file") from error
    except OSError as error:
        raise MediaError("truncated", f"frame {index}: {error}") from error


def encode_jpeg(frame: np.ndarray) -> bytes:
    """uint8 [H, W, 3] RGB -> JPEG bytes."""
    # For a small picture OpenCV takes a third of Pillow's time, which was the largest part of a short clip's row.
    import cv2

    encoded, content = cv2.imencode(
        ".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    )
    if not encoded:
        raise ValueError(f"OpenCV does not encode a picture of shape {frame.shape}")
    return content.tobytes()
