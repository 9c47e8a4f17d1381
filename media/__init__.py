"""Reads and writes clips, images, masks and videos; nothing here uses the network."""

import sys

try:
    import cv2  # noqa: F401
except ImportError as error:
    # servers often lack libGL: one line that says so is of more use than a traceback
    sys.tracebacklimit = 0
    raise ImportError(f"OpenCV can't be loaded ({error}); on a machine without a display: "
                      "pip install --force-reinstall opencv-python-headless") from None
