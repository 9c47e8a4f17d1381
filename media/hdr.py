"""Tone mapping of HDR frames to sRGB, which screens show and the network was trained on."""

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

PQ, HLG = 16, 18  # transfer characteristics (ITU-T H.273)
NAMES = {PQ: "PQ", HLG: "HLG"}
WHITE, PEAK = 203.0, 1000.0  # cd/m2 of diffuse white and of an HLG screen (ITU-R BT.2408, BT.2100)
# Brightness, relative to white, up to which nothing changes. Skin and most objects are below it;
# a lower knee would darken them, a higher one would flatten highlights.
KNEE = 0.5
TOP = 8.0  # brightness, relative to white, that is shown as white; the curve is flat long before
# linear RGB from the primaries of BT.2020 to those of BT.709 (ITU-R BT.2087)
TO_709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083],
                   [-0.0182, -0.1006, 1.1187]])


def tone_down(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """Convert a frame whose `color_trc` is PQ or HLG to (H, W, 3) uint8 RGB.

    Brightness v (diffuse white is 1) is kept up to `KNEE` and becomes 1 - exp(1 - 2 v) / 2 above
    it, which approaches 1.
    """
    signal = reformatter.reformat(frame, format="rgb48le").to_ndarray()
    light = cv2.transform(_LIGHT[frame.color_trc][signal], TO_709)
    return _SHOWN[np.clip(light * (65535 / TOP), 0, 65535).astype(np.uint16)]


def _light() -> dict[int, np.ndarray]:
    """Linear light of each 16-bit signal, 1 being white (ITU-R BT.2100, tables 4 and 5)."""
    signal = np.linspace(0, 1, 65536)
    root = signal ** (1 / 78.84375)
    pq = (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)
    scene = np.where(signal <= 0.5, signal ** 2 / 3,
                     (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    # BT.2100 applies the screen's gamma to luminance; per channel it is exact for grey only, but
    # one look-up table does it
    return {PQ: (pq * 10000 / WHITE).astype(np.float32),
            HLG: (scene ** 1.2 * PEAK / WHITE).astype(np.float32)}


def _shown() -> np.ndarray:
    """8-bit sRGB value for each of 65536 steps of linear light from 0 to `TOP`."""
    light = np.linspace(0, TOP, 65536)
    light = np.where(light <= KNEE, light,
                     1 - (1 - KNEE) * np.exp(-(light - KNEE) / (1 - KNEE)))
    value = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (255 * value).round().astype(np.uint8)


_LIGHT, _SHOWN = _light(), _shown()
