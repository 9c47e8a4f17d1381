"""Segment an object in an image from a box.

    python examples/prompt_image.py IMAGE X Y WIDTH HEIGHT MASK.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from media.images import read_image, write_mask
from media.prompts import Prompts
from tracking.prompting import predict_mask
from videomatch import SHIPPED, VideoMatch


def main(image: str, x: str, y: str, width: str, height: str, out: str) -> None:
    model = VideoMatch.load(SHIPPED["mobilenet"]).eval()
    box = int(x), int(y), int(width), int(height)
    mask = predict_mask(model, read_image(image), Prompts(boxes=[box]))  # (H, W) bool
    write_mask(out, mask.astype("uint8"))


if __name__ == "__main__":
    if len(sys.argv) != 7:
        sys.exit(__doc__)
    main(*sys.argv[1:])
