"""Clips, images, masks, files and drawings: what is read and written. It knows no network."""

import sys

try:
    import cv2  # noqa: F401
except ImportError as error:
    # a server has no libGL: that is the system's lack, so one line says it and no traceback
    sys.tracebacklimit = 0
    raise ImportError(f"OpenCV can't be loaded ({error}); on a machine without a display: "
                      "pip install --force-reinstall opencv-python-headless") from None
