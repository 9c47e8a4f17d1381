"""Losses that compare a frame's probabilities with its ground truth mask."""

import torch
import torch.nn.functional as F


def dice(probabilities: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Dice loss, 1 - (2 * intersection + 1) / (sum of both + 1), averaged over objects.

    Args:
        probabilities: (N+1, H, W), channel 0 the background, summing to 1.
        truth: (H, W) int64 ground truth, 0 background, 1 to N objects.
    """
    probability, target = probabilities[1:], _one_hot(truth, len(probabilities))[1:]
    intersection = (probability * target).sum((1, 2))
    total = probability.sum((1, 2)) + target.sum((1, 2))
    return (1 - (2 * intersection + 1) / (total + 1)).mean()


def cross_entropy(probabilities: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Cross-entropy averaged over pixels (binary for a single object). Arguments as for `dice`."""
    # clamped, as log(0) is infinite; a pixel beyond the limits has no gradient
    return F.nll_loss(probabilities.clamp(1e-6, 1 - 1e-6).log()[None], truth[None])


def balanced(probabilities: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Class-balanced cross-entropy: object and background contribute equally.

    Foreground pixels are weighted by the fraction of background, background pixels by the
    fraction of foreground (Xie and Tu: Holistically-nested edge detection, ICCV 2015, equation
    2). With several objects a class is weighted by the fraction of pixels outside of it.
    Arguments as for `dice`.
    """
    weight = 1 - _one_hot(truth, len(probabilities)).mean((1, 2))
    return (weight[truth] * F.nll_loss(probabilities.clamp(1e-6, 1 - 1e-6).log()[None],
                                       truth[None], reduction="none")[0]).mean()


def grouping(probabilities: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Loss of several objects: segmentation of their union, and identity inside of it.

    The Dice loss of the union, plus the cross-entropy of identities given the foreground. The
    latter is averaged over each object's true pixels, then over objects, so that small and large
    ones count alike: in `cross_entropy`, which factorises into the same two parts, an object of
    a thousandth of the frame has almost no weight. 0 for a single object. Arguments as for `dice`.
    """
    foreground = probabilities[1:].sum(0)
    if len(probabilities) == 2:
        return 0 * foreground.mean()
    union = dice(torch.stack([1 - foreground, foreground]), (truth > 0).long())
    target = _one_hot(truth, len(probabilities))[1:]
    log_identity = (probabilities[1:] / foreground.clamp(min=1e-6)).clamp(min=1e-4).log()
    count = target.sum((1, 2))
    mean = -(target * log_identity).sum((1, 2)) / count.clamp(min=1)
    return union + mean.sum() / (count > 0).sum().clamp(min=1)


def _one_hot(truth: torch.Tensor, count: int) -> torch.Tensor:
    """(H, W) int64 labels -> (count, H, W) float32, 1 where the label is the channel's."""
    return F.one_hot(truth, count).permute(2, 0, 1).float()


LOSSES = {"dice": dice, "bce": cross_entropy, "balancedbce": balanced}
