"""Draw a small data set in DAVIS layout, identical every time: a demo without a download.

Spotted and striped creatures move, turn and deform in front of drifting hills, partly behind trees.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from media import files, images

ROOT = Path("demo_davis")
VERSION = "1"  # raise it when the pictures change, so that existing folders are drawn again
SHAPE = (360, 640)  # H, W; small enough to evaluate on a CPU in seconds
FRAMES = 24  # per sequence


@dataclass(frozen=True)
class Scene:
    """What a sequence shows."""

    seed: int
    creatures: int = 1  # objects
    trees: int = 1  # which occlude the creatures


SCENES = {
    "train": {"crossing": Scene(11), "forest": Scene(12, trees=3),
              "passing": Scene(13, creatures=2), "meadow": Scene(14, trees=0)},
    "val": {"stroll": Scene(21), "meeting": Scene(22, creatures=2),
            "hiding": Scene(23, trees=2), "hills": Scene(24, trees=0)},
}


def make(root: Path = ROOT) -> Path:
    """Draw the data set into `root` unless it is there already; returns the folder."""
    version = root / "VERSION"
    if version.is_file() and version.read_text() == VERSION:
        return root
    for set_name, scenes in SCENES.items():
        for name, scene in scenes.items():
            _write_sequence(root, name, scene)
        for year in ("2016", "2017"):
            path = root / "ImageSets" / year / f"{set_name}.txt"
            files.write(path, "".join(f"{name}\n" for name in scenes))
    files.write(version, VERSION)  # last: it marks a complete data set
    return root


def _write_sequence(root: Path, name: str, scene: Scene) -> None:
    """Draw a sequence and write its frames and masks."""
    frames, masks = (root / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
    frames.mkdir(parents=True, exist_ok=True)
    masks.mkdir(parents=True, exist_ok=True)
    for i, (image, mask) in enumerate(draw(scene)):
        images.write_image(frames / f"{i:05d}.jpg", image)
        images.write_mask(masks / f"{i:05d}.png", mask)


def draw(scene: Scene, frames: int = FRAMES) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (H, W, 3) uint8 RGB frames and (H, W) uint8 masks, 0 background, 1..N creatures."""
    rng = np.random.default_rng(scene.seed)
    height, width = SHAPE
    backdrop = _landscape(rng, (height, width + 120))
    creatures = [Creature(rng, i, scene.creatures) for i in range(scene.creatures)]
    trunks = [(width * (i + 1) // (scene.trees + 1) + int(rng.integers(-40, 40)),
               int(rng.integers(14, 22)), _bark(rng)) for i in range(scene.trees)]
    for t in np.linspace(0, 1, frames):
        shift = int(120 * t)
        image = backdrop[:, shift:shift + width].copy()
        mask = np.zeros(SHAPE, np.uint8)
        for object_id, creature in enumerate(creatures, start=1):
            creature.paint(image, mask, object_id, t)
        for centre, half, bark in trunks:
            strip = slice(centre - half, centre + half)
            image[:, strip] = bark[:, :2 * half]
            mask[:, strip] = 0
        noise = rng.normal(0, 4, image.shape)  # as a camera has; no two frames are identical
        yield np.clip(image + noise, 0, 255).astype(np.uint8), mask


class Creature:
    """A patterned shape with eyes and a wavy outline that crosses the picture.

    Args:
        index, count: number of this creature, and of all in the scene.
    """

    RADIUS = 75  # pixels

    def __init__(self, rng: np.random.Generator, index: int, count: int):
        height, width = SHAPE
        self.skin = _skin(rng, 4 * self.RADIUS, striped=index % 2 == 1)
        self.start = np.array([width * 0.17, height * (index + 1.2) / (count + 1.2)])
        self.end = np.array([width * 0.83, self.start[1] + rng.uniform(-30, 30)])
        if index % 2:
            self.start[0], self.end[0] = self.end[0], self.start[0]
        self.size = rng.uniform(0.8, 1.0) / (1 + 0.3 * (count - 1))
        self.turn = rng.uniform(0.4, 1.0) * rng.choice([-1, 1])
        self.waves = rng.uniform(0.04, 0.16, 3), rng.uniform(0, 2 * np.pi, 3)
        self.bob = rng.uniform(10, 25)

    def paint(self, image: np.ndarray, mask: np.ndarray, object_id: int, t: float) -> None:
        """Draw the creature at time t in [0, 1] over image and mask, in place."""
        middle = 2 * self.RADIUS
        angles = np.linspace(0, 2 * np.pi, 180, endpoint=False)
        radius = self.RADIUS * (1 + sum(
            amplitude * np.sin((i + 2) * angles + phase + 4 * t)
            for i, (amplitude, phase) in enumerate(zip(*self.waves))))
        outline = middle + radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
        stencil = np.zeros((2 * middle, 2 * middle), np.uint8)
        cv2.fillPoly(stencil, [np.round(outline).astype(np.int32)], 255)

        centre = self.start + (self.end - self.start) * t + (0, self.bob * np.sin(2 * np.pi * t))
        pose = cv2.getRotationMatrix2D((middle, middle), np.degrees(self.turn * t),
                                        self.size * (1 + 0.2 * np.sin(3 * t)))
        pose[:, 2] += centre - middle
        size = mask.shape[::-1]
        alpha = cv2.warpAffine(stencil, pose, size)[..., None] / 255
        skin = cv2.warpAffine(self.skin, pose, size, borderMode=cv2.BORDER_REFLECT)
        image[:] = (image * (1 - alpha) + skin * alpha).astype(np.uint8)
        mask[alpha[..., 0] >= 0.5] = object_id


def _skin(rng: np.random.Generator, side: int, striped: bool) -> np.ndarray:
    """Return (side, side, 3) uint8: spots or stripes in two colours, shading, and two eyes."""
    base, mark = _colour(rng.uniform(0, 25), 190, 215), _colour(rng.uniform(95, 120), 150, 110)
    if striped:
        base, mark = _colour(rng.uniform(130, 160), 150, 190), _colour(28, 120, 235)
    skin = np.full((side, side, 3), base, np.uint8)
    if striped:
        for x in range(0, side, 34):
            cv2.line(skin, (x, 0), (x + 40, side), mark, 12, cv2.LINE_AA)
    else:
        for x, y in rng.integers(0, side, (70, 2)).tolist():
            cv2.circle(skin, (x, y), int(rng.integers(5, 13)), mark, -1, cv2.LINE_AA)
    for x in (side // 2 - 18, side // 2 + 18):
        cv2.circle(skin, (x, side // 2 - 22), 13, (250, 250, 250), -1, cv2.LINE_AA)
        cv2.circle(skin, (x + 4, side // 2 - 20), 6, (20, 20, 20), -1, cv2.LINE_AA)
    return _add_texture(rng, skin, grain=10, strength=14)


def _landscape(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Return (H, W, 3) uint8: a sky and three ranges of hills, each greener than the one behind."""
    height, width = shape
    sky = np.linspace(0, 1, height)[:, None, None]
    picture = np.array((150, 190, 225)) * (1 - sky) + np.array((235, 225, 205)) * sky
    picture = np.repeat(picture, width, axis=1).astype(np.uint8)
    x = np.arange(width)
    for i in range(3):
        line = height * (0.35 + 0.2 * i) + sum(
            rng.uniform(6, 22) * np.sin(x * rng.uniform(0.005, 0.02) + rng.uniform(0, 6))
            for _ in range(3))
        hill = np.stack([np.r_[x, width, 0], np.r_[line, height, height]], 1)
        hue = 75 - 15 * i + rng.uniform(-8, 8)
        cv2.fillPoly(picture, [hill.astype(np.int32)], _colour(hue, 60 + 35 * i, 165 - 22 * i))
    return _add_texture(rng, picture, grain=7, strength=16)


def _bark(rng: np.random.Generator) -> np.ndarray:
    """Return (H, 48, 3) uint8: a strip of tree trunk."""
    trunk = np.full((SHAPE[0], 48, 3), _colour(rng.uniform(8, 18), 110, 95), np.uint8)
    for x in rng.integers(0, 48, 10).tolist():
        cv2.line(trunk, (x, 0), (x + int(rng.integers(-8, 8)), SHAPE[0]), (60, 45, 35), 1)
    return _add_texture(rng, trunk, grain=5, strength=18)


def _colour(hue: float, saturation: float, value: float) -> tuple[int, ...]:
    """Convert OpenCV's HSV (hue in [0, 180), the others in [0, 255]) to an RGB tuple."""
    pixel = np.array([[[hue % 180, saturation, value]]]).astype(np.uint8)
    return tuple(cv2.cvtColor(pixel, cv2.COLOR_HSV2RGB)[0, 0].tolist())


def _add_texture(rng: np.random.Generator, picture: np.ndarray, grain: int,
                 strength: float) -> np.ndarray:
    """Add light and dark blotches at three sizes around `grain` pixels."""
    height, width = picture.shape[:2]
    shade = np.zeros((height, width))
    for size in (grain * 3, grain, max(2, grain // 3)):
        coarse = rng.normal(size=(height // size + 2, width // size + 2))
        shade += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(picture + strength * shade[..., None] / np.sqrt(3), 0, 255).astype(np.uint8)
