"""The triplet loss by its definition: every triplet in one (A, M, M) tensor, the gradient by autograd."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch.nn.functional import normalize, softplus

from tercet.types import Embeddings

INF = torch.inf


@dataclass(frozen=True)
class Cells:
    """One row per view of an example."""

    z: torch.Tensor
    example_id: torch.Tensor
    label: torch.Tensor
    view: torch.Tensor
    content_hash: torch.Tensor
    example: torch.Tensor


def cells(e, views):
    pairs = [(v, i) for v in range(min(views, len(e.z))) for i in range(len(e))]
    v, i = torch.tensor(pairs, dtype=torch.long).view(-1, 2).unbind(1)
    return Cells(normalize(e.z[v, i], dim=-1), e.example_id[i], e.label[i], v, e.content_hash[v, i], e.content_hash[:2, i])


def roles(a, k):
    """Which keys are positives of an anchor and which are negatives: two masks ``(A, M)``."""
    same_id = a.example_id[:, None] == k.example_id
    same_label = (a.label[:, None] == k.label) & (k.label >= 0)
    related = (same_id | same_label) & (k.view < 2)  # the third view is a negative, even of its own example
    itself = same_id & (a.view[:, None] == k.view)
    copy = a.content_hash[:, None] == k.content_hash
    shared = (a.example[:, :, None] == k.example[:, None]).any(0) & (k.view < 2)  # the question, or the answer
    return related & ~itself, ~related & ~copy & ~shared


def chosen(near, far, positive, negative, mining, fallback):
    """The mined triplets ``(A, M, M)`` of the six rules but for the margin, and the mined pairs ``(A, M)``."""
    if mining == "batch_hard":
        positive = only(positive, near.masked_fill(~positive, -INF).argmax(1))
    if mining == "easy_positive":
        positive = only(positive, near.masked_fill(~positive, INF).argmin(1))
    triplet = positive[:, :, None] & negative[:, None, :]
    beyond = triplet & (far[:, None, :] > near[:, :, None])
    if mining in ("semihard", "easy_positive"):
        first = only(beyond, far[:, None, :].expand_as(beyond).masked_fill(~beyond, INF).argmin(2))
        farthest = only(triplet, far[:, None, :].expand_as(triplet).masked_fill(~triplet, -INF).argmax(2))
        mined = torch.where(beyond.any(2, keepdim=True), first, farthest & fallback)
    elif mining == "batch_hard":
        mined = only(triplet, far[:, None, :].expand_as(triplet).masked_fill(~triplet, INF).argmin(2))
    else:
        mined = {"all": triplet, "hard": triplet & ~beyond, "all_semihard": beyond}[mining]
    return mined, positive


def only(mask, place):
    """``mask``, with the one place of the last dimension that is given."""
    return mask & (torch.arange(mask.shape[-1]) == place[..., None])


def twin(anchors, keys, margin, mining, fallback, form, divide_by):
    """Total and count."""
    a, k = cells(anchors, 2), cells(keys, 3)
    distance = (a.z[:, None] - k.z).square().sum(2)
    positive, negative = roles(a, k)
    if not distance.numel():
        return distance.sum(), 0
    mined, pairs = chosen(distance.detach(), distance.detach(), positive, negative, mining, fallback)
    gap = distance[:, :, None] - distance[:, None, :] + margin
    if mining == "all_semihard" or form == "hinge":
        mined = mined & (gap > 0)
    loss = gap if form == "hinge" else softplus(gap)
    return loss[mined].sum(), {"active": int(mined.sum()), "pairs": int(pairs.sum()), "sum": 0}[divide_by]


# The 24 corners of the 24-cell: distances are 0, 1, 2, 3 or 4 without rounding, so that ties are ties.
SIGNS = torch.tensor([[a, b, c, d] for a in (1, -1) for b in (1, -1) for c in (1, -1) for d in (1, -1)])
CORNERS = torch.cat([torch.eye(4), -torch.eye(4), SIGNS / 2]).double()
LABELS = (
    lambda n: st.lists(st.integers(-1, 2), min_size=n, max_size=n),
    lambda n: st.sampled_from([[0] * n, [-1] * n, list(range(n)), [0] * (n - 1) + [-1]]),
)


@st.composite
def batches(draw, corners):
    """Anchors and keys: any labels, examples drawn twice, equal contents; anchors are some, all or none of the keys."""
    n, views = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    label = torch.tensor(draw(st.one_of(*(labels(n) for labels in LABELS))))
    content = torch.tensor(draw(st.lists(st.integers(0, 4 * n * views), min_size=n * views, max_size=n * views)))
    again = torch.tensor(draw(st.lists(st.integers(0, n - 1), max_size=3)), dtype=torch.long)
    rows = torch.cat([torch.arange(n), again])
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    shape = (views, len(rows))
    if corners:
        z = CORNERS[torch.randint(draw(st.sampled_from([1, 3, 24])), shape, generator=g)]
    else:
        z = torch.randn(*shape, 4, generator=g, dtype=torch.float64)
    keys = Embeddings(z, rows, label[rows], rows, content.view(views, n)[:, rows])
    start, stop = sorted(draw(st.tuples(*[st.integers(0, len(rows))] * 2)))
    outside = draw(st.booleans())
    return keys.select(slice(start, stop)), keys.select(slice(stop, None)) if outside else keys
