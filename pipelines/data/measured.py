"""What is measured of a clip: the columns that a features row carries nested and `measures` has flat."""

import pyarrow as pa

MEASURED: tuple[tuple[str, pa.DataType, str], ...] = (
    ("peak", pa.float32(), "largest absolute sample, 0 .. 1"),
    ("rms_db", pa.float32(), "level of the whole clip, dB below full scale; null for digital silence"),
    ("loudness_lufs", pa.float32(), "integrated loudness (ITU-R BS.1770-4); null where every block is gated away"),
    ("silent_share", pa.float32(), "share of 50 ms blocks whose level is under -60 dBFS"),
    ("clipped_share", pa.float32(), "share of samples at full scale (0.999 and more)"),
    ("dc_offset", pa.float32(), "mean of the samples, -1 .. 1"),
    ("motion", pa.float32(), "mean absolute difference of successive frames at 16 fps, 0 .. 255"),
    ("static_share", pa.float32(), "share of steps between frames in which no sixteenth of a side visibly changes"),
    ("brightness", pa.float32(), "mean luma of the frames, 0 .. 255"),
    ("num_cuts", pa.int32(), "hard scene cuts (PySceneDetect's AdaptiveDetector)"),
    ("cuts_s", pa.list_(pa.float32()), "when each new scene begins, seconds from the clip's start"),
    ("source_width", pa.int32(), "width of the file's picture, pixels; null where the reader does not tell"),
    ("source_height", pa.int32(), "height of the file's picture, pixels; null where the reader does not tell"),
    ("source_fps", pa.float32(), "mean frame rate of the file; null where the reader does not tell"),
    ("source_rate_hz", pa.int32(), "sample rate of the file's sound; null where the reader does not tell"),
    ("source_channels", pa.int32(), "channels of the file's sound; null where the reader does not tell"),
)
"""What is measured of every clip while it is decoded: name, type, meaning."""
MEASURE_STRUCT = pa.struct([(name, kind) for name, kind, _ in MEASURED])
