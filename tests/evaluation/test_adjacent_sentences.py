"""Adjacent sentences: against a plain loop, and what cannot be measured."""

import datasets
import pytest
import torch

from tercet.errors import InputError
from tercet.evaluation import AdjacentSentences
from tests.evaluation.fakes import Listed, broken


class Books(Listed):
    @property
    def columns(self):
        return ("text",)


def books(lengths=(7, 9, 2), repeat=False):
    text = [f"{d}-{i}" for d, n in enumerate(lengths) for i in range(n)]
    if repeat:
        text[3] = text[0]
    return Books(
        {
            "text": text,
            "label": [d for d, n in enumerate(lengths) for _ in range(n)],
            "position": [i for n in lengths for i in range(n)],
        }
    )


def random_vectors(texts):
    return torch.stack([torch.randn(8, generator=torch.Generator().manual_seed(hash(text) % 10**6)) for text in texts])


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("repeat", [False, True])
def test_the_best_of_the_window_is_the_guess(sides, similarity, repeat):
    source = books(repeat=repeat)
    got = AdjacentSentences(source, 4, sides, similarity, "x")(random_vectors)
    text = source.table["text"]
    forward, backward, either, chance = [], [], [], 0
    for start in (0, 7, 11):  # one window of the first document, two of the second, none of the third
        rows = text[start : start + 4]
        z = random_vectors(rows)
        f, g = z.chunk(2, 1) if sides == 2 else (z, z)
        for i in range(4):
            allowed = [j for j in range(4) if j != i and (rows[j] != rows[i] or abs(i - j) == 1)]
            norm = {j: float(g[j].norm()) if similarity == "cosine" else 1.0 for j in allowed}
            score = {float(f[i] @ g[j]) / norm[j]: j for j in reversed(allowed)}  # of equal ones the first
            best = score[max(score)]
            forward += [best == i + 1] if i < 3 else []
            backward += [best == i - 1] if i > 0 else []
            either += [abs(best - i) == 1]
            chance += sum(abs(j - i) == 1 for j in allowed) / len(allowed)
    expected = {"forward": sum(forward) / 9, "backward": sum(backward) / 9, "accuracy": sum(either) / 12, "chance": chance / 12}
    assert got == pytest.approx({f"adjacent_sentences/x/{name}": value for name, value in expected.items()})
    values = AdjacentSentences(source, 4, sides, similarity, "x").examples(random_vectors)
    by_sentence = {"forward": forward, "backward": backward, "accuracy": either}
    assert {name: x.tolist() for name, x in values.items()} == {f"adjacent_sentences/x/{n}": x for n, x in by_sentence.items()}


def test_an_encoder_that_knows_the_next_one_is_right():
    def knows(texts):  # f of a sentence is g of the next
        place = [int(text.split("-")[1]) for text in texts]
        return torch.stack([torch.cat([torch.eye(10)[p + 1], torch.eye(10)[p]]) for p in place])

    got = AdjacentSentences(books((9,)), 9, 2, "dot", "x")(knows)
    assert got["adjacent_sentences/x/forward"] == 1
    assert got["adjacent_sentences/x/accuracy"] == pytest.approx(8 / 9)  # the last has no next one; its guess is the first


def test_a_gap_in_the_places_ends_a_window():
    source = books((8,))
    source.table["position"][4:] = [p + 5 for p in source.table["position"][4:]]
    windows = AdjacentSentences(source, 4, 1, "dot", "x")._windows()[1]
    assert [list(rows) for rows in windows] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 2}, "window=2"),
        ({"window": 50}, "no document of x has so many"),
        ({"num_outputs": 3}, "num_outputs=3"),
        ({"similarity": "l2"}, "similarity=l2"),
        ({"source": Listed({"text": ["a", "b"]})}, "no label and no position"),
        ({"source": None}, "source is not set"),
    ],
)
def test_what_cannot_be_is_explained(change, message):
    settings = {"name": "x", "source": books(), "window": 4, "num_outputs": 1, "similarity": "dot"} | change
    with pytest.raises(InputError, match=message):
        AdjacentSentences(**settings)(random_vectors)


def test_an_odd_vector_has_no_two_sides():
    with pytest.raises(InputError, match="has 7 columns"):
        AdjacentSentences(books(), 4, 2, "dot", "x")(lambda texts: random_vectors(texts)[:, :7])
    with pytest.raises(InputError, match="not finite"):
        AdjacentSentences(books(), 4, 2, "dot", "x")(broken)


def test_the_fake_is_a_source():
    assert isinstance(books().rows(), datasets.Dataset)
