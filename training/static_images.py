"""Still images with masks, as they lie on disk: `images/` and `masks/` in a folder.

It knows nothing of how a clip is made of one.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from masks.read import read_mask
from media import images

log = logging.getLogger(__name__)

TYPES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".jp2")


@dataclass(frozen=True)
class StaticImage:
    """One image and its mask: a sequence (`davis.Sequence`) of a single frame.

    Args:
        name: the files' stem.
        images, masks: a file each.
    """

    name: str
    images: tuple[Path]
    masks: tuple[Path]

    labelled = (0,)  # frames with a mask

    def __len__(self) -> int:
        return 1

    def image(self, index: int = 0) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        return images.read_image(self.images[index])

    def mask(self, index: int = 0) -> np.ndarray:
        """(H, W) uint8, 0 background, else the object's id; see `media.masks.read_mask`."""
        return read_mask(self.masks[index])

    def check(self) -> None:
        """Look at both headers.

        Raises:
            OSError: a file that is no image.
            ValueError: sizes that differ.
        """
        shape = images.image_shape(self.images[0], "an image")
        mask_shape = images.image_shape(self.masks[0], f"the mask of {self.images[0]}")
        images.check_same_shape(self.images[0], shape, self.masks[0], mask_shape)


class StaticImages:
    """The still images of a folder, sorted by name.

    Args:
        root: the folder with `images` and `masks`, whose files match by stem.

    Raises:
        FileNotFoundError: no such folders, nothing in them, or an image without its mask or a
            mask without its image.
        OSError: a file that is no image.
        ValueError: two files of one stem, or what `Still.check` refuses.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        found, masks = (self._files(kind) for kind in ("images", "masks"))
        for path in (path for stem, path in sorted(found.items()) if stem not in masks):
            raise FileNotFoundError(f"{self.root / 'masks' / path.stem}.png: no such mask, "
                                    f"expected one for {path}")
        for path in (path for stem, path in sorted(masks.items()) if stem not in found):
            raise FileNotFoundError(f"{self.root / 'images' / path.stem}.jpg: no such image, "
                                    f"expected one for the mask {path}")
        self.stills = [StaticImage(stem, (found[stem],), (masks[stem],)) for stem in sorted(found)]
        for still in self.stills:
            still.check()

    def __len__(self) -> int:
        return len(self.stills)

    def __iter__(self):
        return iter(self.stills)

    def _files(self, kind: str) -> dict[str, Path]:
        """The image files of a folder by their stem."""
        folder = self.root / kind
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder (--stills), expected images/ and "
                                    f"masks/ in {self.root}")
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
