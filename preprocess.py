"""Convert images to tensors and back; augment images and masks together.

As a script it previews the augmentation:
    python preprocess.py IMG.jpg MASK.png [--save FILE]
"""

import argparse
import logging
import math
from pathlib import Path

import cv2
import numpy as np
import torch
from torchvision import transforms as v1
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from masks.read import read_masks
from masks.validation import check_frame
from media import drawing, figures, images
from system import errors

log = logging.getLogger(__name__)

# RGB in [0, 1]; what torchvision's ImageNet weights were trained with
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def to_tensor(image: np.ndarray, shape: tuple[int, int] | None = None,
              device: torch.device | str = "cpu") -> torch.Tensor:
    """Convert an image to a (3, H, W) float32 tensor, ImageNet-normalised.

    Args:
        image: (H, W, 3) uint8 RGB.
        shape: output size (H, W); defaults to the image's size.
        device: of the tensor. A GPU gets bytes from pinned memory, a quarter of the data and copied
            asynchronously, and normalises them itself.

    Raises:
        ValueError: other dimensions or another dtype.
    """
    check_frame(image)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    if shape is not None and tuple(tensor.shape[-2:]) != tuple(shape):
        tensor = TF.resize(tensor, list(shape), antialias=True)
    if torch.device(device).type == "cuda":
        return _normalize(tensor.pin_memory().to(device, non_blocking=True))
    return _normalize(tensor.to(device))


def _normalize(image: torch.Tensor) -> torch.Tensor:
    """Normalise (..., 3, H, W) uint8 to float32 with ImageNet's mean and standard deviation."""
    return TF.normalize(image.float().div_(255), IMAGENET_MEAN, IMAGENET_STD, inplace=True)


def to_image(tensor: torch.Tensor) -> np.ndarray:
    """Convert a (3, H, W) normalised tensor to (H, W, 3) uint8 RGB: the inverse of `to_tensor`."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((tensor.cpu() * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def adjust_colour(image: np.ndarray, brightness: float, contrast: float, saturation: float,
                  hue: float) -> np.ndarray:
    """Change brightness, contrast, saturation and hue of an (H, W, 3) uint8 RGB image.

    All four are linear in RGB, so one matrix does it: hue is a rotation about grey in YIQ
    (Haeberli: Matrix operations for image processing, 1993).

    Args:
        brightness, contrast, saturation: factors; 1 changes nothing.
        hue: rotation in radians.
    """
    grey = np.array([0.299, 0.587, 0.114])
    to_yiq = np.array([grey, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    cos, sin = saturation * math.cos(hue), saturation * math.sin(hue)
    change = np.linalg.inv(to_yiq) @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ to_yiq
    offset = np.full((3, 1), 128 * brightness * (1 - contrast))
    return cv2.transform(image, np.concatenate([change * brightness * contrast, offset], 1))


class Augment:
    """Random crop, flip and colour change; image and mask get the same geometry.

    Images are resized with antialiasing, masks by nearest neighbour (bilinear masks would grow at
    the border). Randomness comes from torch's global generator.

    Args:
        shape: output size (H, W).
        random: False only resizes to `shape`.
    """

    # Area of a crop as a share of the frame's: down to objects 2.6 times as large.
    SCALE = (0.15, 1.0)
    CROPS = 10  # random crops tried for one that keeps enough of the objects; then the whole frame
    KEEP = 0.25  # a crop's share of object pixels is at least this fraction of the frame's
    ZOOM = 0.12  # largest logarithm of the change of scale from one frame of a clip to the next

    def __init__(self, shape: tuple[int, int], random: bool = True):
        self.shape: tuple[int, int] = (shape[0], shape[1])
        self.random = random
        ratio = shape[1] / shape[0]
        self.ratio = (ratio * 0.8, ratio * 1.25)  # distortion stays below a quarter

    def __call__(self, image: np.ndarray, mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment a frame.

        Args:
            image, mask: (H, W, 3) uint8 RGB and (H, W) uint8.

        Returns:
            (3, *shape) normalised float32 and (*shape) uint8.
        """
        return self.clip([(image, mask)])[0]

    def clip(self, frames: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple]:
        """Augment a clip as a whole: a crop that drifts and zooms, one flip, one colour change.

        Args:
            frames: images and masks, as in `__call__`, of one size.
        """
        masks = torch.stack([torch.from_numpy(mask) for _, mask in frames])  # (T, H, W)
        size = masks.shape[1:]
        box = self._box(masks.amax(0, keepdim=True)) if self.random else (0, 0, *size)
        drift, zoom = torch.zeros(2), 1.0
        if self.random:
            drift = (torch.rand(2) - 0.5) * 0.1 * min(box[2:])  # up to 5 % of the crop per frame
            zoom = math.exp((torch.rand(()).item() - 0.5) * 2 * self.ZOOM)
        crops = []
        for i, (image, mask) in enumerate(frames):
            shape = [min(size[axis], round(box[2 + axis] * zoom ** i)) for axis in (0, 1)]
            center = [box[axis] + box[2 + axis] / 2 + drift[axis].item() * i for axis in (0, 1)]
            corner = [min(max(0, round(center[axis] - shape[axis] / 2)), size[axis] - shape[axis])
                      for axis in (0, 1)]
            crops.append(self._crop(image, mask, (*corner, *shape)))
        images, masks = (torch.stack(parts) for parts in zip(*crops))
        if self.random:
            images = self.colour(images)
        if self.random and torch.rand(()) < 0.5:
            images, masks = images.flip(-1), masks.flip(-1)
        return list(zip(_normalize(images), masks))

    @staticmethod
    def colour(images: torch.Tensor) -> torch.Tensor:
        """Apply one random change of colour to all images, (T, 3, H, W) uint8.

        Brightness, contrast and saturation change by up to 30 %, hue by 5 % of the circle.
        """
        change = (torch.rand(4) * 2 - 1) * torch.tensor([0.3, 0.3, 0.3, 0.05 * 2 * math.pi])
        brightness, contrast, saturation, hue = change.tolist()
        frames = [adjust_colour(frame, 1 + brightness, 1 + contrast, 1 + saturation, hue)
                  for frame in images.permute(0, 2, 3, 1).contiguous().numpy()]
        return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)

    def _crop(self, image: np.ndarray, mask: np.ndarray,
              box: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Crop and resize a frame and its mask to (3, *shape) and (*shape) uint8.

        Args:
            box: top, left, height, width.
        """
        image, mask = torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask)[None]
        image = TF.resized_crop(image, *box, list(self.shape), antialias=True)
        mask = TF.resized_crop(mask, *box, list(self.shape),
                               interpolation=v2.InterpolationMode.NEAREST_EXACT)
        return image, mask[0]

    def _box(self, mask: torch.Tensor) -> tuple[int, int, int, int]:
        """Return a random crop (top, left, height, width) that keeps some of the objects.

        Args:
            mask: (1, H, W), non-zero where any frame shows an object.
        """
        share = (mask > 0).float().mean()
        for _ in range(self.CROPS):
            top, left, height, width = v1.RandomResizedCrop.get_params(mask, self.SCALE, self.ratio)
            crop = mask[:, top:top + height, left:left + width]
            if (crop > 0).float().mean() >= self.KEEP * share:
                return top, left, height, width
        return 0, 0, *mask.shape[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description="Preview the augmentation of a frame.")
    parser.add_argument("image", type=Path, help="image file")
    parser.add_argument("mask", type=Path, help="mask file of the image")
    parser.add_argument("--save", metavar="FILE", type=Path,
                        help="write the figure to FILE instead of opening a window")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # prints how the mask was read
    with errors.one_line(parser):
        preview(args)


def preview(args: argparse.Namespace) -> None:
    """Show an image with its mask next to five random augmentations."""
    image = images.read_image(args.image)
    mask = read_masks({0: [args.mask]}, image.shape[:2], args.image)[0]
    panels = [("frame and mask", drawing.overlay(image, mask))]
    augment = Augment(image.shape[:2])
    for i in range(5):
        new_image, new_mask = augment(image, mask)
        picture = drawing.overlay(to_image(new_image), new_mask.numpy())
        panels.append((f"augmented {i + 1}", picture))
    figures.show_or_save(panels, 3, args.save, Path("augmentation.png"))


if __name__ == "__main__":
    main()
