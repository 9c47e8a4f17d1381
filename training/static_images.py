"""Static images with masks, in a folder's `images/` and `masks/`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from masks.read import read_mask
from media import images

TYPES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".jp2")


@dataclass(frozen=True)
class StaticImage:
    """An image with its mask; has the interface of a `davis.Sequence` of one frame.

    Args:
        name: the files' stem.
        images, masks: one file each.
    """

    name: str
    images: tuple[Path]
    masks: tuple[Path]

    labelled = (0,)  # frames with a mask

    def __len__(self) -> int:
        return 1

    def image(self, index: int = 0) -> np.ndarray:
        """Return the (H, W, 3) uint8 RGB image."""
        return images.read_image(self.images[index])

    def mask(self, index: int = 0) -> np.ndarray:
        """Return the (H, W) uint8 mask, 0 background, 1..255 objects; see `masks.read`."""
        return read_mask(self.masks[index])

    def check(self) -> None:
        """Check both files' headers.

        Raises:
            OSError: a file is no image.
            ValueError: image and mask differ in size.
        """
        shape = images.image_shape(self.images[0], "an image")
        mask_shape = images.image_shape(self.masks[0], f"the mask of {self.images[0]}")
        images.check_same_shape(self.images[0], shape, self.masks[0], mask_shape)


def find_static_images(root: Path) -> list[StaticImage]:
    """Return the static images of a folder, sorted by name.

    Args:
        root: folder with `images` and `masks`, whose files match by stem.

    Raises:
        FileNotFoundError: a folder is missing or empty, or an image or a mask has no counterpart.
        OSError: a file is no image.
        ValueError: two files have the same stem, or image and mask differ in size.
    """
    files, masks = (_files_by_stem(root, kind) for kind in ("images", "masks"))
    for stem in sorted(files.keys() - masks.keys()):
        raise FileNotFoundError(f"{root / 'masks' / stem}.png: no such mask, expected one for "
                                f"{files[stem]}")
    for stem in sorted(masks.keys() - files.keys()):
        raise FileNotFoundError(f"{root / 'images' / stem}.jpg: no such image, expected one for "
                                f"the mask {masks[stem]}")
    static_images = [StaticImage(stem, (files[stem],), (masks[stem],)) for stem in sorted(files)]
    # all headers now: a broken file must not end a training hours later
    for image in static_images:
        image.check()
    return static_images


def _files_by_stem(root: Path, kind: str) -> dict[str, Path]:
    """Return the image files of the subfolder `kind` by their stem."""
    folder = root / kind
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder (--stills), expected images/ and "
                                f"masks/ in {root}")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in TYPES or path.name.startswith("."):
            continue
        if path.stem in files:
            raise ValueError(f"{path}: a second file of the name {path.stem}, expected one: "
                             f"there is {files[path.stem]}")
        files[path.stem] = path
    if not files:
        raise FileNotFoundError(f"{folder}: no images there, expected files such as "
                                f"{', '.join(TYPES[:3])}")
    return files
