"""Encoder: ImageNet backbones, truncated at the layer whose features are matched.

Matching uses middle layers, which still resolve position. The narrow middle layers of MobileNetV2
discriminate poorly on their own, so a deeper, more semantic one is concatenated. Other layers
serve the refinement of masks.
"""

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models
from torchvision.models.vgg import cfgs, make_layers

log = logging.getLogger(__name__)


class ReLU6(nn.Module):
    """min(max(x, 0), 6), in place, of float tensors of any shape; fast in bfloat16.

    PyTorch clamps bfloat16 on a CPU by way of float32, element by element, which took a quarter of
    the encoder's time. Without gradients the bits are clamped as integers instead: those of
    numbers >= 0 sort like the numbers, and those of negative numbers are negative integers. The
    result is the same, except that NaN becomes 0 or 6.
    """

    SIX = 0x40C0  # the bits of 6 in bfloat16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.bfloat16 or x.requires_grad:
            return F.relu6(x, inplace=True)
        x.view(torch.int16).clamp_(0, self.SIX)
        return x


def _vgg19():
    return make_layers(cfgs["E"], batch_norm=False)[:27]


def _resnet101():
    net = models.resnet101(weights=None)
    names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2")
    return nn.Sequential(OrderedDict((name, getattr(net, name)) for name in names))


def _mobilenet_v2():
    layers = models.mobilenet_v2(weights=None).features[:17]
    for module in list(layers.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, ReLU6())
    return layers


@dataclass(frozen=True)
class Backbone:
    """What the encoder needs of a torchvision architecture, and its defaults for matching."""

    build: Callable[[], nn.Sequential]
    layer: str  # that is matched, in the terms of the architecture, for messages
    levels: dict[int, int]  # index and channels of each layer returned, finest first
    matched: tuple[int, ...]  # matched layers, concatenated at the stride of the first
    stride: int  # pixels per location of the matched features
    frozen: int  # number of leading layers that are not trained; they respond to edges and colours
    prefix: str  # of these parameters in torchvision's state dict
    imagenet: models.WeightsEnum
    # Defaults of new models. At stride 16 small objects have few locations, so features (factor)
    # and frames (zoom) are enlarged more and fewer similarities are averaged
    factor: float = 1.0
    top_k: int = 20
    zoom: float = 1.0

    @property
    def finest(self) -> int:
        """Number of channels of the first matched layer."""
        return self.levels[self.matched[0]]

    @property
    def channels(self) -> int:
        """Number of channels of all matched layers together."""
        return sum(self.levels[layer] for layer in self.matched)

    @property
    def finer(self) -> int:
        """Number of levels finer than the matched one; each level halves the resolution."""
        return list(self.levels).index(self.matched[0])


BACKBONES = {
    "vgg": Backbone(_vgg19, "conv4_4", {17: 256, 26: 512}, (26,), 8, 5, "features.",
                    models.VGG19_Weights.IMAGENET1K_V1),
    "resnet": Backbone(_resnet101, "layer2", {4: 256, 5: 512}, (5,), 8, 4, "",
                       models.ResNet101_Weights.IMAGENET1K_V1),
    "mobilenet": Backbone(_mobilenet_v2, "features.13 and features.16",
                          {3: 24, 6: 32, 13: 96, 16: 160}, (13, 16), 16, 4, "features.",
                          models.MobileNet_V2_Weights.IMAGENET1K_V1,
                          factor=2.0, top_k=5, zoom=1.2),
}


class Layers(nn.Sequential):
    """A sequence of layers that returns the outputs of several of them."""

    def __init__(self, layers: nn.Sequential):
        super().__init__(OrderedDict(layers.named_children()))

    def forward(self, x: torch.Tensor, wanted: Iterable[int]) -> dict[int, torch.Tensor]:
        """The outputs of the `wanted` layers, by index; layers after the last of them don't run."""
        outputs = {}
        for i, layer in enumerate(islice(self, max(wanted) + 1)):
            x = layer(x)
            if i in wanted:
                outputs[i] = x
        return outputs


def _norms(layers: nn.Module) -> Iterator[tuple[str, nn.Module, str, str]]:
    """Yield each convolution with a BatchNorm: parent's name, parent, names of the two in it."""
    for parent, module in layers.named_modules():
        children = list(module.named_children())
        for (name, layer), (next_name, norm) in zip(children, children[1:]):
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                yield parent, module, name, next_name


def _fold(layers: nn.Module) -> nn.Module:
    """Fold every BatchNorm into the convolution before it, in place."""
    for _, module, conv, norm in list(_norms(layers)):
        setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv).eval(),
                                                getattr(module, norm).eval()))
        setattr(module, norm, nn.Identity())
    return layers


def _folded(layers: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that `_fold` computes, differentiable in those of convolution and norm."""
    parameters = dict(layers.named_parameters())
    for parent, module, name, next_name in _norms(layers):
        conv, norm = getattr(module, name), getattr(module, next_name)
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        path = f"{parent}.{name}".lstrip(".")
        parameters[f"{path}.weight"] = conv.weight * scale[:, None, None, None]
        parameters[f"{path}.bias"] = norm.bias - norm.running_mean * scale
    return parameters


class Encoder(nn.Module):
    """Compute the feature maps of an image.

    Parameters are random until `load_imagenet` or a checkpoint sets them. BatchNorm always uses
    its stored statistics, in training too: with one or two frames per batch they would drift. The
    first layers are frozen, which makes a training step cheaper.

    Args:
        name: a key of `BACKBONES`.
    """

    def __init__(self, name: str):
        super().__init__()
        if name not in BACKBONES:
            raise ValueError(f"unknown encoder {name!r}, expected one of {', '.join(BACKBONES)}")
        self.name = name
        self.spec = BACKBONES[name]
        # NHWC: on a CPU MobileNetV2 takes half the time (docs/performance.md)
        self.backbone = Layers(self.spec.build()).to(memory_format=torch.channels_last)
        for layer in islice(self.backbone, self.spec.frozen):
            layer.requires_grad_(False)
        # Training runs these layers without BatchNorm, on parameters that `_folded` computes, for
        # speed. Without storage ("meta"); in a tuple, so that they are no submodule
        self._folded = (_fold(copy.deepcopy(self.backbone)).to("meta"),)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """The matched features: (B, 3, H, W) float32 -> (B, C, h, w), h about H / stride."""
        return self._joined(self._run(image, self.spec.matched))

    def pyramid(self, image: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The matched features, as by `forward`, and those of all `levels`, finest first.

        Args:
            image: (B, 3, H, W) ImageNet-normalised float32.
        """
        levels = self._run(image, self.spec.levels)
        return self._joined(levels), list(levels.values())

    def _joined(self, levels: dict[int, torch.Tensor]) -> torch.Tensor:
        """Concatenate the matched layers, normalised so that a cosine weights them equally."""
        first, *others = (levels[i] for i in self.spec.matched)
        if not others:
            return first
        others = [F.interpolate(level, size=first.shape[-2:], mode="bilinear",
                                align_corners=False) for level in others]
        return torch.cat([F.normalize(level.float(), dim=1) for level in (first, *others)],
                         1).to(first.dtype)

    def _run(self, image: torch.Tensor, wanted: Iterable[int]) -> dict[int, torch.Tensor]:
        """The outputs of the `wanted` layers, by index."""
        image = image.contiguous(memory_format=torch.channels_last)
        if self.training and any(_norms(self.backbone)):
            return functional_call(self._folded[0], _folded(self.backbone), (image, wanted))
        return self.backbone(image, wanted)

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def fold_batchnorm(self):
        """Fold every BatchNorm into its convolution: the same features in less time. Irreversible.

        For inference only: parameters of the folded encoder don't match those of a checkpoint.
        """
        _fold(self.backbone)
        return self

    def load_imagenet(self, source: str | Path | None = None):
        """Load ImageNet weights into the backbone.

        Args:
            source: a file with a state dict in torchvision's layout (the classifier may be
                missing); None downloads torchvision's weights into the cache of `torch.hub`
                (under `TORCH_HOME`) unless they are cached.

        Raises:
            OSError: the file can't be read, or the download failed.
            ValueError: the file is not a state dict of this backbone.
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
                "pass one with --encoder_weights PATH, or start from random weights with "
                "--encoder_weights none") from error
