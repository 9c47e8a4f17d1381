"""Track an object through a clip from the mask of its first frame.

    python examples/track_clip.py CLIP FIRST_MASK.png OUT_DIR
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from masks.read import read_mask
from media.images import write_mask
from media.video import open_clip
from videomatch import load_tracker


def main(clip: str, first_mask: str, out: str) -> None:
    tracker = load_tracker()
    for index, image in enumerate(open_clip(clip).frames()):  # (H, W, 3) uint8 RGB, streamed
        step = tracker.step(image, read_mask(first_mask) if index == 0 else None)
        write_mask(Path(out) / f"{index:05d}.png", step.mask)
        print(index, {i: round(sure, 3) for i, sure in step.confidence().items()})


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
