"""The picture of a space says what is true of it."""

import pytest
import torch
import torch.nn.functional as F

from tercet.app.components import build
from tercet.evaluation.alignment_uniformity import alignment, uniformity
from tercet.training.callbacks.embeddings import EmbeddedSample, draw_embeddings, read_item
from tests.conftest import composed, tiny


def sample(views=2, n=12, d=5, labels=None):
    z = F.normalize(torch.randn(views, n, d), dim=-1)
    return EmbeddedSample(z, torch.full((n,), -1) if labels is None else labels)


def test_two_views_are_the_true_pairs():
    one = sample()
    true, other = one.pairs()
    torch.testing.assert_close(true, (one.z[0] * one.z[1]).sum(1))
    assert len(other) == 12 * 11


def test_equal_labels_are_the_true_pairs_of_one_view():
    one = sample(1, 4, labels=torch.tensor([0, 0, -1, -1]))
    true, other = one.pairs()
    torch.testing.assert_close(true, one.z[0, :1] @ one.z[0, 1])
    assert len(true) == 1 and len(other) == 4 * 3 / 2 - 1, "each pair once, the true one not among the others"


def test_alignment_and_uniformity_are_the_evaluators():
    one = sample()
    close, spread = one.spread()
    assert close == pytest.approx(alignment(*one.z), rel=1e-4)
    assert spread == pytest.approx(uniformity(one.z[0]), rel=1e-4)


def test_the_spectrum_of_a_collapsed_space_falls_at_once():
    z = torch.randn(1, 20, 1) * torch.ones(1, 1, 6)
    assert float(EmbeddedSample(z, torch.full((20,), -1)).spectrum()[1]) < 1e-5
    assert float(sample(1, 200, 6).spectrum()[-1]) > 0.5


def test_the_map_keeps_the_two_widest_directions():
    z = torch.randn(1, 50, 4) * torch.tensor([3.0, 2.0, 0.1, 0.1])
    place = EmbeddedSample(z, torch.full((50,), -1)).plane()
    kept, whole = place.var(0).sum(), z[0].var(0).sum()
    assert kept / whole > 0.99


def test_it_draws_with_and_without_labels(tmp_path):
    for labels in (None, torch.tensor([0, 1, 2] * 4)):
        figure = draw_embeddings(sample(labels=labels), [("before", 1.0, -2.0), ("test", 0.5, -3.0)], umap=False)
        figure.savefig(tmp_path / "x.png")
        assert len(figure.axes) == 4


def test_the_notable_pairs_are_those_of_a_search():
    one = sample(2, 9)
    scores = one.z[0] @ one.z[1].T
    found = one.notable(3)
    kinds = {
        what: [(i, j) for w, _, i, j in found if w == what] for what in ("hardest positive", "hardest negative", "nearest")
    }
    diagonal = scores.diagonal().argsort()[:3].tolist()
    assert kinds["hardest positive"] == [(i, i) for i in diagonal]
    off = scores - 9 * torch.eye(9)
    assert kinds["hardest negative"][0] == divmod(int(off.argmax()), 9)
    assert kinds["nearest"] == [(i, int(scores[i].argmax())) for i in range(3)]
    assert all(cosine == pytest.approx(float(scores[i, j]), abs=1e-6) for _, cosine, i, j in found)


def test_equal_labels_are_no_negatives():
    labels = torch.tensor([0, 0, 1, 1, -1, -1])
    for what, _, i, j in sample(1, 6, labels=labels).notable(20):
        assert i != j
        assert bool(labels[i] == labels[j] and labels[i] >= 0) == (what == "hardest positive") or what == "nearest"


def test_the_worst_triplets_are_those_of_a_search():
    one = sample(1, 10, labels=torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3, -1]))
    scores = one.z[0] @ one.z[0].T
    found = []
    for a in range(10):
        positives = [p for p in range(10) if p != a and one.label[p] == one.label[a] >= 0]
        negatives = [n for n in range(10) if n != a and n not in positives]
        if positives:
            p, n = min(positives, key=lambda i: scores[a, i]), max(negatives, key=lambda i: scores[a, i])
            found.append((float(scores[a, n] - scores[a, p]), a, p, n))
    expected = [row[1:] for row in sorted(found, reverse=True)]
    assert [row[:3] for row in one.triplets(20)] == expected
    assert sample(1, 5).triplets(3) == [], "without labels there are none"
    assert [row[:2] for row in sample(2, 4).triplets(4)] != [] and all(a == p for a, p, *_ in sample(2, 4).triplets(4))


def test_images_that_cannot_be_used_are_left_out():
    encoder = build(composed("model=resnet_small", "model.pixels.size=16").model)
    cells = [{"bytes": content, "path": None} for content in (b"image", b"whatever", None)]
    assert read_item(encoder, cells[0]) is read_item(encoder, cells[2]) is None
    assert read_item(encoder, "a text") == "a text" and read_item(build(composed(*tiny()).model), cells[1]) == b"whatever"
