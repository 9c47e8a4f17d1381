"""Truncated ImageNet backbones.

VideoMatch compares features, so the backbone stops in the middle of the network, where
features still know where they are.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models
from torchvision.models.vgg import cfgs, make_layers

log = logging.getLogger(__name__)


def _vgg19():
    return make_layers(cfgs["E"], batch_norm=False)[:27]


def _resnet101():
    net = models.resnet101(weights=None)
    names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2")
    return nn.Sequential(OrderedDict((name, getattr(net, name)) for name in names))


def _mobilenet_v2():
    return models.mobilenet_v2(weights=None).features[:14]


@dataclass(frozen=True)
class Backbone:
    build: Callable[[], nn.Sequential]
    layer: str  # the last layer kept, in the words of the architecture
    channels: int
    stride: int  # pixels per feature cell
    prefix: str  # of the kept parameters in torchvision's state dict
    imagenet: models.WeightsEnum
    finer: dict[int, int]  # layers whose features refine a mask: their index and channels


BACKBONES = {
    "vgg": Backbone(_vgg19, "conv4_4", 512, 8, "features.", models.VGG19_Weights.IMAGENET1K_V1,
                    {17: 256}),
    "resnet": Backbone(_resnet101, "layer2", 512, 8, "", models.ResNet101_Weights.IMAGENET1K_V1,
                       {4: 256}),
    "mobilenet": Backbone(_mobilenet_v2, "features.13", 96, 16, "features.",
                          models.MobileNet_V2_Weights.IMAGENET1K_V1, {3: 24, 6: 32}),
}


class Encoder(nn.Module):
    """Image to feature grid.

    Args:
        name: a key of `BACKBONES`.

    The parameters start random; `load_imagenet` or a checkpoint fills them. BatchNorm layers
    always use their stored statistics, in training too: with a batch of one or two frames
    the running statistics would drift.
    """

    def __init__(self, name: str):
        super().__init__()
        if name not in BACKBONES:
            raise ValueError(f"unknown encoder {name!r}, expected one of {', '.join(BACKBONES)}")
        self.name = name
        self.spec = BACKBONES[name]
        # NHWC: on a CPU MobileNetV2 takes half the time (docs/performance.md)
        self.backbone = self.spec.build().to(memory_format=torch.channels_last)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) ImageNet-normalised float32 -> (B, C, h, w), about H and W / stride."""
        return self.pyramid(image)[-1]

    def pyramid(self, image: torch.Tensor) -> list[torch.Tensor]:
        """The same, behind the features of the finer layers, the finest first."""
        x, levels = image.contiguous(memory_format=torch.channels_last), []
        for i, layer in enumerate(self.backbone):
            x = layer(x)
            if i in self.spec.finer:
                levels.append(x)
        return [*levels, x]

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def fold_batchnorm(self):
        """Fold every BatchNorm into its convolution: the same features, faster, for good.

        For use, not for training: the folded encoder has other parameters than a checkpoint.
        """
        for module in list(self.backbone.modules()):
            children = list(module.named_children())
            for (name, layer), (next_name, norm) in zip(children, children[1:]):
                if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    setattr(module, name, fuse_conv_bn_eval(layer.eval(), norm.eval()))
                    setattr(module, next_name, nn.Identity())
        return self

    def load_imagenet(self, source: str | Path | None = None):
        """Fill the backbone with ImageNet weights.

        Args:
            source: a file with a state dict in torchvision's layout (the classifier may be
                missing); None downloads torchvision's own into the cache of `torch.hub`
                (under `TORCH_HOME`) unless it is there already.

        Raises:
            OSError: the file can't be read, or the download failed.
            ValueError: the file isn't a state dict of this backbone.
        """
        state = self._download() if source is None else self._read(Path(source))
        prefix = self.spec.prefix
        wanted = self.backbone.state_dict().keys()
        try:
            self.backbone.load_state_dict({name: state[prefix + name] for name in wanted})
        except (KeyError, RuntimeError) as error:
            origin = source or self.spec.imagenet.url
            raise ValueError(f"{origin}: not weights of encoder {self.name!r} in torchvision's "
                             f"layout ({str(error).splitlines()[-1].strip()})") from error

    @staticmethod
    def _read(path: Path) -> dict:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, expected encoder weights "
                                    "(--encoder_weights PATH)")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{path}: not a file of PyTorch weights") from error
        if not isinstance(state, dict):
            raise ValueError(f"{path}: expected a state dict, found {type(state).__name__}")
        return state

    def _download(self) -> dict:
        url = self.spec.imagenet.url
        cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
        if not cached.is_file():
            log.info("downloading ImageNet weights %s to %s", url, cached)
        try:
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", progress=False,
                                                      check_hash=True, weights_only=True)
        except Exception as error:
            raise OSError(
                f"could not get the ImageNet weights {url} ({error}): put the file at {cached}, "
                "name one with --encoder_weights PATH, or take random weights with "
                "--encoder_weights none") from error
