"""Truncated backbones against torchvision's whole networks."""

import urllib.error

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from network.encoder import BACKBONES, Encoder, ReLU6


def whole_network(name):
    """torchvision's network, and a function that returns its features at the matched layers."""
    torch.manual_seed(1)
    if name == "vgg":
        net = nn.ModuleDict({"features": models.vgg.make_layers(models.vgg.cfgs["E"])})
        relus = [i for i, m in enumerate(net["features"]) if isinstance(m, nn.ReLU)]
        last = relus[2 + 2 + 4 + 4 - 1]  # conv4_4 is the twelfth convolution
        return net, lambda x: net["features"][:last + 1](x)
    net = {"resnet": models.resnet101, "mobilenet": models.mobilenet_v2}[name]().eval()
    if name == "mobilenet":
        def joined(x):
            fine = net.features[:14](x)
            coarse = F.interpolate(net.features[14:17](fine), fine.shape[2:], mode="bilinear")
            unit = [level / level.square().sum(1, keepdim=True).sqrt() for level in (fine, coarse)]
            return torch.cat(unit, 1)
        return net, joined
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    return net, lambda x: net.layer2(net.layer1(stem(x)))


def randomize_batchnorm(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_features_equal_those_of_the_whole_network(name, tmp_path):
    net, features = whole_network(name)
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    encoder = Encoder(name).eval()
    encoder.load_imagenet(tmp_path / "weights.pth")
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        found, expected = encoder(image), features(image)
    # the layouts of memory differ, and with them the order of sums: 1.1e-5 was seen on AVX2
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    spec = BACKBONES[name]
    channels = {"vgg": 512, "resnet": 512, "mobilenet": 96 + 160}[name]
    assert found.shape == (1, channels, 64 // spec.stride, 96 // spec.stride)


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_batchnorm_statistics_stay_frozen_in_training(name):
    encoder = Encoder(name).train()
    before = {k: v.clone() for k, v in encoder.state_dict().items() if "running" in k}
    encoder(torch.randn(2, 3, 32, 32) + 5)
    assert before and all(torch.equal(encoder.state_dict()[k], v) for k, v in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_gradients_equal_those_of_the_whole_network(name, tmp_path):
    net, features = whole_network(name)
    randomize_batchnorm(net)
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    net.double().eval()  # BatchNorm by its stored statistics
    encoder = Encoder(name)
    encoder.load_imagenet(tmp_path / "weights.pth")
    encoder.double().train()
    image = torch.randn(2, 3, 64, 96, dtype=torch.double)
    found, expected = encoder(image), features(image)
    torch.testing.assert_close(found, expected)
    for output in (found, expected):
        output.square().mean().backward()
    parameters, prefix = dict(net.named_parameters()), BACKBONES[name].prefix
    compared = frozen = 0
    for path, parameter in encoder.backbone.named_parameters():
        expected = parameters[prefix + path].grad
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected)
            compared += 1
        elif expected is not None:
            assert not parameter.requires_grad
            frozen += 1
    assert compared >= 20 and frozen >= 2
    assert compared + frozen == sum(p.grad is not None for p in parameters.values())


def test_the_pyramid_holds_the_layers_before_and_after():
    encoder = Encoder("mobilenet").eval()
    with torch.no_grad():
        features, levels = encoder.pyramid(torch.randn(1, 3, 64, 96))
    assert [tuple(level.shape[1:]) for level in levels] == [
        (24, 16, 24), (32, 8, 12), (96, 4, 6), (160, 2, 3)]
    torch.testing.assert_close(features[:, :96], F.normalize(levels[2], dim=1))


@pytest.mark.parametrize("name", BACKBONES)
def test_folded_batchnorm_gives_the_same_features(name):
    torch.manual_seed(2)
    encoder = Encoder(name).eval()
    randomize_batchnorm(encoder)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        before = encoder(image)
        after = encoder.fold_batchnorm()(image)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * before.abs().max().item())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in encoder.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relu6_clamps_to_6(dtype):
    numbers = [-torch.inf, -7, -6, -1e-20, -0.0, 0, 1e-20, 0.5, 5.97, 6, 6.03, 1e30, torch.inf]
    x = torch.tensor(numbers, dtype=dtype).reshape(1, 1, 1, -1)
    expected = [min(max(number, 0), 6) for number in x.flatten().tolist()]
    assert ReLU6()(x.clone()).flatten().tolist() == expected
    x.requires_grad_()
    ReLU6()(x * 1).sum().backward()
    assert x.grad.flatten().tolist() == [float(0 < y < 6) for y in x.flatten().tolist()]


def test_weights_are_read_from_the_torch_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    net, _ = whole_network("mobilenet")
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(net.state_dict(), folder / "mobilenet_v2-b0353104.pth")
    encoder = Encoder("mobilenet")
    encoder.load_imagenet()
    torch.testing.assert_close(encoder.backbone[0][0].weight, net.features[0][0].weight)


def test_a_failed_download_names_the_file_and_alternatives(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(OSError, match="resnet101-.*pth") as caught:
        Encoder("resnet").load_imagenet()
    message = str(caught.value)
    assert "--encoder_weights PATH" in message and "--encoder_weights none" in message
    assert str(tmp_path) in message and "no network" in message and "\n" not in message


@pytest.mark.parametrize("content", ["missing", "garbage", "list", "other network"])
def test_bad_weight_files_are_named(content, tmp_path):
    path = tmp_path / "weights.pth"
    if content == "garbage":
        path.write_bytes(b"not weights")
    elif content == "list":
        torch.save([1, 2], path)
    elif content == "other network":
        torch.save(models.resnet18().state_dict(), path)
    with pytest.raises((OSError, ValueError), match="weights.pth") as caught:
        Encoder("mobilenet").load_imagenet(path)
    assert "\n" not in str(caught.value)


def test_an_unknown_encoder_is_refused():
    with pytest.raises(ValueError, match="alexnet.*vgg, resnet, mobilenet"):
        Encoder("alexnet")
