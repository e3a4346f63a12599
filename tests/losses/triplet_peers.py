"""Triplet losses of other libraries as they define them: loops over triplets of squared distances between unit vectors."""

import torch
from torch.nn.functional import normalize, relu


def squared(z):
    x = normalize(z, dim=-1)
    return (x[:, None] - x).square().sum(2)


def pairs(label):
    n = range(len(label))
    return [(a, p) for a in n for p in n if a != p and label[a] == label[p]]


def addons(z, label, margin, distance=squared):
    """TensorFlow Addons 0.23, ``triplet_semihard_loss(distance_metric="squared-L2")``.

    For each (a, p) the closest negative with d_an > d_ap, else the one of "negatives_inside", the largest d_an, which is
    0 where there is no negative at all; the mean over all pairs.
    """
    d, losses = distance(z), []
    for a, p in pairs(label):
        negatives = d[a][label != label[a]]
        outside = negatives[negatives > d[a, p]]
        inside = negatives.max() if len(negatives) else torch.zeros_like(d[a, p])
        losses.append(relu(d[a, p] - (outside.min() if len(outside) else inside) + margin))
    return torch.stack(losses).mean()


def metric_learning(z, label, margin, kind):
    """pytorch-metric-learning 2.9, ``TripletMarginMiner(margin, kind)`` with ``TripletMarginLoss(margin)``.

    Both with ``LpDistance(power=2)``: all triplets of the kind; the mean over those with a loss, ``AvgNonZeroReducer``.
    """
    d, losses = squared(z), []
    for a, p in pairs(label):
        gap = d[a][label != label[a]] - d[a, p]
        mined = {"semihard": (gap > 0) & (gap <= margin), "hard": gap <= 0, "all": gap <= margin}[kind]
        losses.append(relu(margin - gap[mined]))
    loss = torch.cat(losses) if losses else z.new_zeros(0)
    return loss[loss > 0].mean() if (loss > 0).any() else (0 * z).sum()
