"""Views: laws for random rows, and rates over many rows."""

from itertools import groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tercet.app.components import build
from tercet.errors import InputError
from tercet.rng import derive_seed, uniform
from tercet.types import RATE_SCALE, TokenBatch
from tercet.views import Crop, Deletion, FeatureCutoff, Masking, Repetition, Shuffle, SpanCutoff, TokenCutoff, TokenInfo, Views
from tests.conftest import choices, composed

# 0, 1 and 2 are special, 2 is the mask; of the others the even ones begin a word.
BEGINS = torch.tensor([i % 2 == 0 for i in range(40)])
SPECIAL = torch.tensor([i < 3 for i in range(40)])
PIECES = TokenInfo(BEGINS, SPECIAL, 2, 30)
KINDS = [TokenCutoff, SpanCutoff, FeatureCutoff, Deletion, Crop, Repetition, Masking]
CUTOFFS = [TokenCutoff, SpanCutoff, FeatureCutoff]
SHEN = [kind(rate, variant="shen") for kind in CUTOFFS for rate in (0.0, 0.2, 0.9)]
ALL = [*(kind(rate) for kind in KINDS for rate in (0.0, 0.2, 0.9)), Shuffle()]

contents = st.lists(st.lists(st.integers(3, 39), min_size=1, max_size=12), min_size=1, max_size=6)


def rows_of(lists):
    return TokenBatch.from_lists([[0, *row, 1] for row in lists])


def seeds(n, seed=7):
    return derive_seed(torch.full((n,), seed), torch.arange(n))


def cut(inputs, names):
    """A batch as one (ids, what travels along) per row."""
    more = {name: inputs.state_field(name).split(inputs.lengths.tolist()) for name in names}
    return [(row.tolist(), *(more[name][i].tolist() for name in names)) for i, row in enumerate(inputs.rows())]


@pytest.mark.parametrize("view", ALL, ids=str)
@given(contents)
def test_a_row_keeps_its_special_tokens_and_something_besides(view, lists):
    out = view(rows_of(lists), seeds(len(lists)), PIECES)
    assert len(out) == len(lists) and int(out.lengths.sum()) == len(out.ids)
    for ids, keep, place in cut(out, ["keep", "position"]):
        assert ids[0] == 0 and ids[-1] == 1 and keep[0] and keep[-1]
        assert len(ids) <= PIECES.max_length
        assert any(kept for i, kept in zip(ids, keep, strict=True) if i not in (0, 1))
        assert place[0] == 0 and place[-1] == len(ids) - 1


@pytest.mark.parametrize("view", [*ALL, *SHEN], ids=str)
@given(contents, st.randoms())
def test_a_row_does_not_depend_on_the_others(view, lists, random):
    n, names = len(lists), ["keep", "position", "feature_cutoff", "attend", "embedding_cutoff"]
    whole = cut(view(rows_of(lists), seeds(n), PIECES), names)
    order = list(range(n))
    random.shuffle(order)
    shuffled = cut(view(rows_of([lists[i] for i in order]), seeds(n)[order], PIECES), names)
    assert shuffled == [whole[i] for i in order]


@pytest.mark.parametrize("view", [*(kind(0.0) for kind in KINDS if kind is not Repetition), *SHEN[::3]], ids=str)
@given(contents)
def test_a_rate_of_zero_changes_nothing(view, lists):
    out = view(rows_of(lists), seeds(len(lists)), PIECES)
    assert out.ids.tolist() == rows_of(lists).ids.tolist()
    assert out.state.keep is None or out.state.keep.all()
    assert out.state.attend is None or out.state.attend.all()
    for cutoff in (out.state.feature_cutoff, out.state.embedding_cutoff):
        assert cutoff is None or not cutoff[:, 1].any()


@given(contents)
def test_deletion_takes_whole_words(lists):
    rows = rows_of(lists)
    out = Deletion(0.5)(rows, seeds(len(lists)), PIECES)
    for before, after in zip(lists, out.rows(), strict=True):
        left = after.tolist()[1:-1]
        kept = iter(words_of(before))
        assert all(any(word == other for other in kept) for word in words_of(left, before))


def words_of(row, of=None):
    """Runs that begin with an even piece; the first may begin anyhow."""
    words = []
    for piece in row:
        if piece % 2 == 0 or not words:
            words.append([])
        words[-1].append(piece)
    return words


@given(contents, st.sampled_from([0.1, 0.5, 0.9]))
def test_crop_is_a_piece_of_the_row_of_its_share(lists, rate):
    out = Crop(rate)(rows_of(lists), seeds(len(lists)), PIECES)
    for before, after in zip(lists, out.rows(), strict=True):
        left = after.tolist()[1:-1]
        starts = [i for i in range(len(before)) if before[i : i + len(left)] == left]
        assert left and starts


@given(st.lists(st.lists(st.integers(3, 39), min_size=1, max_size=12, unique=True), min_size=1, max_size=6))
def test_repetition_only_doubles_pieces(lists):
    out = Repetition(0.9)(rows_of(lists), seeds(len(lists)), PIECES)
    for before, after in zip(lists, out.rows(), strict=True):
        runs = [(piece, len(list(run))) for piece, run in groupby(after.tolist()[1:-1])]
        assert [piece for piece, _ in runs] == before and all(count <= 2 for _, count in runs)
        assert sum(count == 2 for _, count in runs) <= max(2, int(0.9 * len(before)))


@given(contents)
def test_shuffle_exchanges_the_places_of_content(lists):
    out = Shuffle()(rows_of(lists), seeds(len(lists)), PIECES)
    assert out.ids.tolist() == rows_of(lists).ids.tolist()
    for ids, place in cut(out, ["position"]):
        assert sorted(place) == list(range(len(ids)))


def test_shares_are_what_was_asked_for():
    n, length, rate = 400, 20, 0.3
    rows = TokenBatch.from_lists([[0, *[4] * length, 1]] * n)
    seed, total = seeds(n), n * length
    token = TokenCutoff(rate)(rows, seed, PIECES).state.keep
    assert abs((~token).sum() / total - rate) < 0.015
    assert torch.equal(SpanCutoff(rate)(rows, seed, PIECES).lengths, rows.lengths)
    spans = (~SpanCutoff(rate)(rows, seed, PIECES).state.keep).view(n, -1)
    assert (spans.sum(1) == rate * length).all()
    assert (spans.int().diff(dim=1).abs().sum(1) <= 2).all()  # one span
    assert abs((total - int((Deletion(rate)(rows, seed, PIECES).lengths - 2).sum())) / total - rate) < 0.015
    assert ((Crop(rate)(rows, seed, PIECES).lengths - 2) == (1 - rate) * length).all()
    masked = Masking(rate)(rows, seed, PIECES).ids == PIECES.mask_id
    assert abs(masked.sum() / total - rate) < 0.015
    added = Repetition(rate)(rows, seed, PIECES).lengths - rows.lengths
    assert sorted(set(added.tolist())) == list(range(7))  # 0 to 0.3 x 20
    erase = FeatureCutoff(rate)(rows, seed, PIECES).state.feature_cutoff
    assert (erase[:, 1] == round(rate * RATE_SCALE)).all() and len(set(erase[:, 0].tolist())) == n


def test_draws_are_even_and_independent():
    x = uniform(derive_seed(torch.zeros(200_000, dtype=torch.long), torch.arange(200_000)), 3)
    assert abs(x.mean() - 0.5) < 0.003 and abs(x.var() - 1 / 12) < 0.002
    y = uniform(derive_seed(torch.zeros(200_000, dtype=torch.long), torch.arange(200_000)), 4)
    assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 0.01
    assert float(x.min()) >= 0 and float(x.max()) < 1


def test_looks_differ_by_side_step_seed_and_place_in_the_chain():
    rows, uid = rows_of([[4] * 12] * 3), torch.arange(3)
    chain = [Deletion(0.5)]
    views = Views(chain, chain, 1)
    first, second = views(rows, uid, 0, PIECES)
    keep = [x.lengths.tolist() for x in (first, second)]
    assert keep[0] != keep[1]
    token = Views([TokenCutoff(0.5), TokenCutoff(0.5)], [TokenCutoff(0.5)], 1)(rows, uid, 0, PIECES)
    assert (token[0].state.keep <= Views([TokenCutoff(0.5)], [], 1)(rows, uid, 0, PIECES)[0].state.keep).all()
    assert token[0].state.keep.sum() < token[1].state.keep.sum()
    at = [Views(chain, [], seed)(rows, uid, step, PIECES)[0].lengths.tolist() for seed, step in [(1, 0), (1, 1), (2, 0)]]
    assert len({tuple(x) for x in at}) == 3
    assert Views(chain, [], 1)(rows, uid, 0, PIECES)[0].lengths.tolist() == at[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [1.0, -0.1, 1.5])
def test_a_rate_that_leaves_nothing_is_refused(kind, rate):
    with pytest.raises(InputError, match=rf"{kind.__name__} with rate={rate}"):
        kind(rate)


@pytest.mark.parametrize("name", choices("view"))
def test_every_configuration_builds(name, tmp_path):
    (tmp_path / "synonyms.tsv").write_text("big\tlarge\n")
    needed = [f"view.second.0.path={tmp_path}/synonyms.tsv"] if name == "synonyms" else []
    views = build(composed(f"view={name}", "objective=simcse_unsup", *needed).view)
    assert views.identical == (name == "dropout")


def test_the_first_token_of_a_row_begins_a_word_whatever_its_mark():
    """RoBERTa's first word has no mark; two words would always go together."""
    inputs = rows_of([[3, 4, 5, 6]] * 200)
    first, second = 3, 4  # an odd piece continues a word, where one is there
    left = [set(ids) for ids, *_ in cut(Deletion(0.5)(inputs, seeds(200), PIECES), [])]
    assert any(first in row and second not in row for row in left)
    assert any(first not in row and second in row for row in left)


@pytest.mark.parametrize("rate", [0.1, 0.29, 0.7])
@pytest.mark.parametrize("kind", [TokenCutoff, SpanCutoff])
def test_cutoff_as_published_takes_a_fixed_share_of_all_tokens(kind, rate):
    """int(rate * length): as a span, or as draws with replacement that may hit a token twice."""
    lists, seed = [[4] * n for n in (1, 8, 18, 28)] * 100, seeds(400)
    rows = [keep for _, keep in cut(kind(rate, variant="shen")(rows_of(lists), seed, PIECES), ["attend"])]
    lost = [keep.count(False) for keep in rows]
    most = [int(torch.tensor(len(keep)) * rate) for keep in rows]
    if kind is SpanCutoff:
        assert lost == most
        ends = [len(keep) - keep[::-1].index(False) for keep in rows if not all(keep)]
        assert ends == [keep.index(False) + n for keep, n in zip(rows, lost, strict=True) if n]
    else:
        assert all(n <= limit for n, limit in zip(lost, most, strict=True))
        expected = sum(len(keep) * (1 - (1 - 1 / len(keep)) ** n) for keep, n in zip(rows, most, strict=True))
        assert abs(sum(lost) / expected - 1) < 0.05
    assert any(not keep[0] for keep in rows), "special tokens too"


def test_a_cutoff_has_two_variants():
    with pytest.raises(InputError, match="variant=paper: choose one of input, shen"):
        TokenCutoff(variant="paper")


def test_two_feature_cutoffs_in_a_look_are_refused():
    inputs, cutoff = rows_of([[4, 6, 8]]), FeatureCutoff(0.1)
    with pytest.raises(InputError, match="one FeatureCutoff"):
        cutoff(cutoff(inputs, seeds(1), PIECES), seeds(1), PIECES)
