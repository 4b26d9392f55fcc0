"""Sound of any layout -> mono, by what each channel is.

Part of the reader (`media.py`). Surround sound is folded to stereo and that to mono with the weights of ITU-R BS.775:
the centre goes to both sides and the surrounds to their own at -3 dB; the channel of bass effects (LFE) is left out.
Weights are scaled to add up to 1, so that nothing clips. All this is what libswresample does by default; a plain mean
would bury speech, which sits in the centre alone, and let the effects rumble. Mono and stereo are their plain mean.
"""

import math

import numpy as np
from av.audio.frame import AudioFrame
from av.audio.layout import AudioLayout

HALF_POWER = math.sqrt(0.5)
CHANNEL_WEIGHTS = {
    **dict.fromkeys(("FL", "FR", "FLC", "FRC", "DL", "DR", "WL", "WR"), 0.5),
    **dict.fromkeys(("BL", "BR", "SL", "SR", "TFL", "TFR", "TBL", "TBR", "TSL", "TSR"), 0.5 * HALF_POWER),
    **dict.fromkeys(("FC", "TFC"), HALF_POWER),
    **dict.fromkeys(("BC", "TBC", "TC"), 0.5),
    **dict.fromkeys(("LFE", "LFE2"), 0.0),
}
"""Share of a channel in (left + right) / 2, before scaling."""

USUAL_LAYOUTS = {6: "5.1", 8: "7.1"}
"""What so many channels are where the file does not say; PCM in Matroska never does."""


def mono_weights(layout: AudioLayout) -> np.ndarray:
    """float64 [channels], sum 1; equal ones where a channel has no place in the room or nothing but bass is left."""
    names = [channel.name for channel in layout.channels]
    if set(names) == {"NONE"} and layout.nb_channels in USUAL_LAYOUTS:
        names = [channel.name for channel in AudioLayout(USUAL_LAYOUTS[layout.nb_channels]).channels]
    known = len(names) == layout.nb_channels and all(name in CHANNEL_WEIGHTS for name in names)
    weights = np.array([CHANNEL_WEIGHTS[name] for name in names]) if known else np.zeros(1)
    if not weights.sum():
        return np.full(layout.nb_channels, 1 / layout.nb_channels)
    return weights / weights.sum()


class MonoMixer:
    """Mixes the blocks of one stream."""

    def __init__(self) -> None:
        self._layout: str | None = None
        self._weights = np.ones(1)

    def __call__(self, frame: AudioFrame) -> np.ndarray:
        """float32 [samples], full scale at 1."""
        if frame.layout.name != self._layout or len(self._weights) != frame.layout.nb_channels:
            self._layout, self._weights = frame.layout.name, mono_weights(frame.layout)
        samples = frame.to_ndarray()
        if not frame.format.is_planar:
            samples = samples.reshape(-1, frame.layout.nb_channels).T
        if len(samples) == 1 and samples.dtype == np.float32:
            return samples[0]
        mixed = self._weights @ samples.astype(np.float64, copy=False)
        if samples.dtype.kind == "u":
            mixed -= 128.0
        full_scale = {"u": 128.0, "i": 2.0 ** (8 * samples.dtype.itemsize - 1), "f": 1.0}[samples.dtype.kind]
        return (mixed / full_scale).astype(np.float32)
