"""Follow an object in front of a camera: drag a box around it, press space; Esc ends.

    python examples/camera.py [CAMERA_INDEX or URL]
"""

import sys
from pathlib import Path

import cv2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from media.drawing import overlay
from media.prompts import Prompts
from tracking.prompting import predict_mask
from videomatch import load_tracker


def main(source: str = "0") -> None:
    camera = cv2.VideoCapture(int(source) if source.isdigit() else source)
    ok, frame = camera.read()
    if not ok:
        sys.exit(f"{source}: no frames")
    box = cv2.selectROI("camera", frame)
    tracker = load_tracker(size=240)  # 480 is more accurate, at a quarter of the frame rate
    mask = predict_mask(tracker.model, frame[..., ::-1].copy(), Prompts(boxes=[box]))
    tracker.step(frame[..., ::-1], mask)
    while ok and cv2.waitKey(1) != 27:
        ok, frame = camera.read()
        if ok:
            image = frame[..., ::-1]
            cv2.imshow("camera", overlay(image, tracker.step(image).mask)[..., ::-1])


if __name__ == "__main__":
    main(*sys.argv[1:])
