"""Follow an object in front of a camera: drag a box around it, press space; Esc ends.

    python examples/camera.py [camera:N or the URL of a stream]
"""

import sys
from pathlib import Path

import cv2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from media.drawing import overlay
from media.live import LiveClip
from media.prompts import Prompts
from tracking.prompting import predict_mask
from videomatch import load_tracker


def main(source: str = "camera:0") -> None:
    tracker = load_tracker(size=240)  # 480 is more accurate, at a quarter of the frame rate
    with LiveClip(source) as clip:
        frames = clip.frames()  # of those that have arrived always the newest
        image = next(frames)
        box = cv2.selectROI("camera", image[..., ::-1])
        tracker.step(image, predict_mask(tracker.model, image, Prompts(boxes=[box])))
        for image in frames:
            cv2.imshow("camera", overlay(image, tracker.step(image).mask)[..., ::-1])
            if cv2.waitKey(1) == 27:
                break


if __name__ == "__main__":
    main(*sys.argv[1:])
