"""The context loss against a plain loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.errors import InputError
from tercet.losses import ContextLoss
from tercet.types import Embeddings


def batch(n, seed, documents=2, contents=None):
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(-1, documents, (n,), generator=g)
    position = torch.randint(0, n, (n,), generator=g)
    content = torch.randint(0, contents or 10**6, (n,), generator=g).expand(2, -1)
    return Embeddings(torch.randn(2, n, 4, generator=g, dtype=torch.float64), torch.arange(n), label, position, content)


def twin(b, context, kind, temperature, self_logit):
    """Row by row, key by key."""
    n, total, count, hits = len(b), 0.0, 0, {"forward": [0, 0], "backward": [0, 0], "neighbor": [0, 0]}
    f, g = b.z
    if kind == "cosine":
        f, g = (x / x.norm(dim=1, keepdim=True) for x in (f, g))
    for i in range(n):
        step = {j: int(b.position[j] - b.position[i]) for j in range(n) if b.label[j] == b.label[i] >= 0 and j != i}
        near = {j for j, s in step.items() if 0 < abs(s) <= context}
        scores = {}
        for j in range(n):
            if j == i:
                if self_logit == "zero":
                    scores[j] = 0.0
                continue
            held = {int(b.content_hash[0][i])} | {int(b.content_hash[1][p]) for p in near}
            if j in near or int(b.content_hash[1][j]) not in held:
                scores[j] = float(f[i] @ g[j]) / temperature
        if near:
            count += 1
            norm = math.log(sum(math.exp(s) for s in scores.values()))
            total -= sum(scores[j] - norm for j in near) / len(near)
        best = max(scores, key=scores.get) if scores else None
        for name, wanted in (
            ("forward", {j for j, s in step.items() if s == 1}),
            ("backward", {j for j, s in step.items() if s == -1}),
            ("neighbor", near),
        ):
            hits[name][0] += best in wanted
            hits[name][1] += bool(wanted)
    return total, count, hits


@settings(max_examples=60)
@given(
    n=st.integers(1, 12),
    seed=st.integers(0, 10**6),
    context=st.integers(1, 3),
    kind=st.sampled_from(["dot", "cosine"]),
    temperature=st.sampled_from([1.0, 0.3]),
    self_logit=st.sampled_from(["excluded", "zero"]),
    contents=st.sampled_from([None, 4]),
)
def test_it_is_the_plain_loop(n, seed, context, kind, temperature, self_logit, contents):
    b = batch(n, seed, contents=contents)
    terms = ContextLoss(context, kind, temperature, self_logit)(b, b)
    total, count, hits = twin(b, context, kind, temperature, self_logit)
    assert float(terms.loss_sum) == pytest.approx(total, abs=1e-9)
    assert int(terms.normalizer) == count
    for name, (right, asked) in hits.items():
        assert terms.stats[f"{name}_accuracy"].tolist() == [right, asked]


def test_the_papers_batch():
    """400 consecutive sentences: every target is ½ and ½, or 1 at the ends; all scores equal cost log of the keys."""
    n = 400
    b = Embeddings(torch.zeros(2, n, 3), torch.arange(n), torch.zeros(n, dtype=torch.long), torch.arange(n),
                 torch.arange(n).expand(2, -1))  # fmt: skip
    for self_logit, keys in (("zero", n), ("excluded", n - 1)):
        terms = ContextLoss(1, "dot", 1.0, self_logit)(b, b)
        assert float(terms.loss_sum / terms.normalizer) == pytest.approx(math.log(keys), rel=1e-5)


def test_nothing_crosses_a_document():
    b = batch(2, 0)
    apart = Embeddings(b.z, b.example_id, torch.tensor([0, 1]), torch.tensor([3, 4]), torch.tensor([[0, 1]] * 2))
    together = Embeddings(b.z, b.example_id, torch.tensor([1, 1]), torch.tensor([3, 4]), torch.tensor([[0, 1]] * 2))
    loss = ContextLoss()
    assert (int(loss(apart, apart).normalizer), int(loss(together, together).normalizer)) == (0, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 0}, "^context=0"),
        ({"similarity": "l2"}, "^similarity=l2"),
        ({"temperature": 0.0}, "^temperature=0"),
        ({"self_logit": "none"}, "^self_logit=none"),
    ],
)
def test_wrong_settings_name_their_parameter(change, message):
    with pytest.raises(InputError, match=message):
        ContextLoss(**change)
