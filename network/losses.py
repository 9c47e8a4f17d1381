"""How far probabilities of a frame are from the truth. It knows nothing of how they came about."""

import torch
import torch.nn.functional as F


def dice(probabilities: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """1 - (2 * intersection + 1) / (sum of both + 1) of each object, averaged over the objects.

    Args:
        probabilities: (N+1, H, W), which sum to 1, the background's first.
        truth: (H, W) integers, 0 background, else 1 to N.
    """
    probability, target = probabilities[1:], _one_hot(truth, len(probabilities))[1:]
    intersection = (probability * target).sum((1, 2))
    total = probability.sum((1, 2)) + target.sum((1, 2))
    return (1 - (2 * intersection + 1) / (total + 1)).mean()


def cross_entropy(probabilities: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Of all pixels, averaged; with one object the binary one. Arguments as for `dice`."""
    return F.nll_loss(probabilities.clamp(1e-6, 1 - 1e-6).log()[None], truth[None])


def balanced(probabilities: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in which object and background weigh alike.

    Foreground pixels are weighted by the share of background, background pixels by the share
    of foreground (Xie and Tu: Holistically-nested edge detection, ICCV 2015, equation 2), and of
    several objects' each by the share of all that is not of the object.
    """
    weight = 1 - _one_hot(truth, len(probabilities)).mean((1, 2))
    return (weight[truth] * F.nll_loss(probabilities.clamp(1e-6, 1 - 1e-6).log()[None],
                                       truth[None], reduction="none")[0]).mean()


def grouping(probabilities: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """How well the union of several objects is found, and whose it is where that is known.

    Dice of the union, plus the cross-entropy of identities given the foreground: averaged over
    each object's true pixels, then over the objects, so that small ones count as large ones do.
    The cross-entropy of all pixels holds the same parts, but an object of a thousandth of the
    frame has next to no weight in it. 0 for a single object. Arguments as for `dice`.
    """
    foreground = probabilities[1:].sum(0)
    if len(probabilities) == 2:
        return 0 * foreground.mean()
    union = dice(torch.stack([1 - foreground, foreground]), (truth > 0).long())
    target = _one_hot(truth, len(probabilities))[1:]
    likely = (probabilities[1:] / foreground.clamp(min=1e-6)).clamp(min=1e-4).log()
    count = target.sum((1, 2))
    mean = -(target * likely).sum((1, 2)) / count.clamp(min=1)
    return union + mean.sum() / (count > 0).sum().clamp(min=1)


def _one_hot(truth: torch.Tensor, count: int) -> torch.Tensor:
    """(H, W) -> (count, H, W) float32."""
    return F.one_hot(truth, count).permute(2, 0, 1).float()


LOSSES = {"dice": dice, "bce": cross_entropy, "balancedbce": balanced}
