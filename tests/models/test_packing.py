"""Attention within rows: by length on a CPU, padded or nested on a GPU. All implementations run on a CPU too."""

import pytest
import torch
import torch.nn.functional as F

from tercet.app.components import build
from tercet.models.engine import packing
from tercet.models.engine.deterministic_dropout import DropoutSeeds
from tercet.models.engine.packing import AttentionSettings, Packing, attend_by_length, attend_nested, attend_padded, attention
from tercet.models.engine.transformers_compat import number_modules
from tercet.types import TokenBatch
from tests.conftest import TEXTS, composed, tiny

LENGTHS = [5, 5, 2, 9, 1, 9]
FUNCTIONS = {"by_length": attend_by_length, "padded": attend_padded, "nested": attend_nested}
GPU = pytest.param("cuda", marks=pytest.mark.gpu)

# Where there is no kernel for them, nested tensors go through torch's older kind, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")


def tokens(lengths, device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(1, 3, sum(lengths), 8, dtype=dtype).to(device).requires_grad_() for _ in range(3)]


def row_by_row(query, key, value, lengths, window=None, attend=None):
    """Attention of each row alone, written out."""
    outs, start = [], 0
    for n in lengths:
        q, k, v = (x[0, :, start : start + n] for x in (query, key, value))
        place = torch.arange(n, device=q.device)
        far = (place[:, None] - place).abs() >= (window or n)
        if attend is not None:
            far = far | ~attend[start : start + n]
        outs.append(((q @ k.mT / 8**0.5).masked_fill(far, -torch.inf).softmax(-1) @ v).transpose(0, 1))
        start += n
    return torch.cat(outs)[None]


def packed(lengths, device="cpu", **options):
    rows = TokenBatch(torch.zeros(sum(lengths), device=device), torch.tensor(lengths, dtype=torch.long))
    return Packing(rows.index, **options)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("name", "window"), [*((f, None) for f in FUNCTIONS), ("by_length", 4), ("padded", 4)])
def test_every_way_is_each_row_alone_in_value_and_gradient(name, window, first, device):
    qkv = tokens(LENGTHS, device)
    rows = packed(LENGTHS, device, first_token_only=first)
    want = row_by_row(*qkv, LENGTHS, window)
    starts = rows.index.start
    query = qkv[0][:, :, starts] if first else qkv[0]
    got = FUNCTIONS[name](query, *qkv[1:], rows, AttentionSettings(window=window))
    want = want[:, starts] if first else want
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    weight = torch.linspace(-1, 1, want.numel(), device=device).view_as(want)
    slopes = [torch.autograd.grad((out * weight).sum(), qkv) for out in (got, want)]
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_way_drops_attention_and_keeps_its_mean(name, device):
    query, key, value = (x.detach() for x in tokens(LENGTHS, device))
    rows = packed(LENGTHS, device)
    want = FUNCTIONS[name](query, key, value, rows, AttentionSettings())
    drawn = torch.stack([FUNCTIONS[name](query, key, value, rows, AttentionSettings(0.3)) for _ in range(600)])
    sure = 6 * drawn.std(0) / 600**0.5 + 1e-4
    assert ((drawn.mean(0) - want).abs() < sure).all()
    assert drawn.std(0).min() > 0


@pytest.mark.parametrize("name", ["by_length", "padded"])
def test_what_is_dropped_by_seed_is_the_same_however_rows_are_kept_apart(name):
    query, key, value = tokens(LENGTHS)
    rows = packed(LENGTHS)
    seed = torch.arange(sum(LENGTHS))[None] + 77
    got = FUNCTIONS[name](query, key, value, rows, AttentionSettings(0.3, seed=seed))
    alone, start = [], 0
    for n in LENGTHS:
        own = slice(start, start + n)
        one = packed([n])
        alone.append(
            attend_padded(*(x[:, :, own] for x in (query, key, value)), one, AttentionSettings(0.3, seed=seed[:, own]))
        )
        start += n
    torch.testing.assert_close(got, torch.cat(alone, 1), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, row_by_row(query, key, value, LENGTHS), atol=1e-2)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("length", [7, 20])
def test_tokens_that_see_none_give_no_gradient_to_their_scores(length, window):
    """All of them are one constant, also for single tokens in whose window all are cut."""
    qkv, seed = tokens([length]), torch.arange(length)[None]
    for attend in (torch.zeros(length).bool(), torch.arange(length) == 0):
        rows, settings = packed([length], attend=attend), AttentionSettings(0.3, None, window, seed)
        got, want = (f(*qkv, rows, settings) for f in (attend_by_length, attend_padded))
        torch.testing.assert_close(got, want)
        weight = torch.linspace(-1, 1, want.numel()).view_as(want)
        for a, b in zip(*(torch.autograd.grad((out * weight).sum(), qkv) for out in (got, want)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("scale", "window", "cut"), [(None, None, False), (0.5, None, True), (None, 4, False), (None, 4, True)]
)
@pytest.mark.parametrize("first", [False, True])
def test_gradients_of_attention_with_dropout_by_seed_are_those_of_autograd(first, scale, window, cut):
    """By length they are written out; padded, autograd finds them."""
    lengths = [*LENGTHS, 17]  # softmax of short rows is written out, too
    attend = torch.arange(sum(lengths)) % 3 != 1 if cut else None
    qkv, rows = tokens(lengths, dtype=torch.float64), packed(lengths, first_token_only=first, attend=attend)
    qkv[2] = qkv[2].detach()[..., :5].requires_grad_()  # some models have shorter values
    seed, starts = torch.arange(sum(lengths))[None] + 77, rows.index.start
    settings = AttentionSettings(0.3, scale, window, seed[:, starts] if first else seed)
    queries = [qkv[0][:, :, starts] if first else qkv[0] for _ in range(2)]
    got, want = (
        f(query, *qkv[1:], rows, settings) for f, query in zip((attend_by_length, attend_padded), queries, strict=True)
    )
    torch.testing.assert_close(got, want)
    weight = torch.linspace(-1, 1, want.numel(), dtype=torch.float64).view_as(want)
    slopes = [torch.autograd.grad((out * weight).sum(), qkv) for out in (got, want)]
    for a, b in zip(*slopes, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b)


def last_layer(query, hidden, rows, settings, layer):
    """What the last layer does when only first tokens are read."""
    rows.all_hidden, rows.dropout_seeds = hidden, DropoutSeeds()
    rows.dropout_seeds.seed = settings.seed
    first = layer.key(hidden[:, rows.index.start]).unflatten(-1, (3, 8)).transpose(1, 2)  # which is not used
    return attention(layer, query, first, first, None, settings.scale, settings.dropout, rows, settings.window)[0]


@pytest.mark.parametrize(
    ("scale", "window", "cut", "dropout", "bias"),
    [(None, None, False, 0.3, True), (0.5, None, True, 0.3, True), (None, 4, True, 0.0, True), (None, 4, False, 0.3, False)],
)
def test_first_tokens_attend_to_hidden_states_as_to_their_keys_and_values(scale, window, cut, dropout, bias):
    lengths = [*LENGTHS, 17]
    layer = torch.nn.Module()
    layer.key, layer.value = (torch.nn.Linear(24, 24, bias, dtype=torch.float64) for _ in range(2))
    number_modules(layer)
    hidden = torch.randn(1, sum(lengths), 24, dtype=torch.float64, requires_grad=True)
    query = torch.randn(1, 3, len(lengths), 8, dtype=torch.float64, requires_grad=True)
    attend = torch.arange(sum(lengths)) % 3 != 1 if cut else None
    settings = AttentionSettings(dropout, scale, window, torch.arange(len(lengths))[None] + 77)
    inputs, found, calls = [query, hidden, *layer.parameters()], [], []
    for by_keys in (False, True):
        hook = layer.key.register_forward_hook(lambda *_: calls.append(1)) if by_keys else None  # hooked, it is called
        rows = packed(lengths, first_token_only=True, attend=attend)
        out = last_layer(query, hidden, rows, settings, layer)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        found.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
        if hook is not None:
            hook.remove()
    assert len(calls) == 2  # for the first tokens and for all
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_attention_with_dropout_by_seed_computes_in_float32_under_autocast(half):
    qkv, rows = tokens(LENGTHS), packed(LENGTHS)
    settings = AttentionSettings(0.3, seed=torch.arange(sum(LENGTHS))[None])
    rounded = [x.detach().to(half).requires_grad_() for x in qkv]
    exact = [x.detach().float().requires_grad_() for x in rounded]
    with torch.autocast("cpu", half):
        got = attend_by_length(*rounded, rows, settings)
        slopes = torch.autograd.grad(got, rounded, torch.ones_like(got))
    want = attend_by_length(*exact, rows, settings)
    torch.testing.assert_close(got, want.to(half), rtol=0, atol=0)
    for a, b in zip(slopes, torch.autograd.grad(want, exact, torch.ones_like(want)), strict=True):
        torch.testing.assert_close(a, b.to(half), rtol=0, atol=0)


def test_large_scores_do_not_overflow():
    (query, key, value), rows = tokens(LENGTHS), packed(LENGTHS)
    settings = AttentionSettings(0.3, 1e4, seed=torch.arange(sum(LENGTHS))[None])
    got, want = (f(query, key, value, rows, settings) for f in (attend_by_length, attend_padded))
    torch.testing.assert_close(got, want)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(got.sum(), [query, key, value]))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_an_encoder_is_the_same_however_its_rows_are_kept_apart(name, pooling, monkeypatch):
    monkeypatch.setattr(packing, "choose_attention", lambda *_: FUNCTIONS[name])
    torch.manual_seed(0)
    encoder = build(composed(*tiny(f"model.pooling={pooling}")).model).eval()
    rows = encoder.prepare(TEXTS)
    alone = torch.cat([encoder(rows.select(torch.tensor([i]))) for i in range(len(rows))])
    torch.testing.assert_close(encoder(rows), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("name", "window"), [("by_length", None), ("padded", None), ("by_length", 4), ("padded", 4)])
def test_no_token_attends_to_one_that_is_cut(name, window, first):
    qkv, attend = tokens(LENGTHS), torch.arange(sum(LENGTHS)) % 5 != 3
    rows = packed(LENGTHS, first_token_only=first, attend=attend)
    query = qkv[0][:, :, rows.index.start] if first else qkv[0]
    got = FUNCTIONS[name](query, *qkv[1:], rows, AttentionSettings(window=window))
    want = row_by_row(*qkv, LENGTHS, window, attend)
    torch.testing.assert_close(got, want[:, rows.index.start] if first else want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="not seen"):
        attend_nested(*qkv, rows, AttentionSettings())


def test_nested_rows_know_neither_windows_nor_seeds():
    rows = packed(LENGTHS)
    for window, seed in ((4, None), (None, torch.zeros(1, sum(LENGTHS), dtype=torch.long))):
        with pytest.raises(ValueError, match="nested attention"):
            attend_nested(*tokens(LENGTHS), rows, AttentionSettings(0.1, None, window, seed))


@pytest.mark.parametrize(
    ("lengths", "wasteful"),
    [
        ([], False),
        ([9, 9, 500], True),
        ([100, 9, 9, 9], False),
        ([128, 128], False),
        ([128, 9, 9], True),
        ([127, 9, 9], False),
        ([500, 400], False),
    ],
)
def test_rows_are_nested_where_padding_would_cost(lengths, wasteful):
    assert packed(lengths).padding_is_wasteful == wasteful


def test_nested_attention_is_verified_by_a_run(monkeypatch, caplog):
    works = packing._nested_attention_works.__wrapped__
    given = (torch.device("cpu"), torch.float32, 8)
    before = torch.get_rng_state()
    assert works(*given)
    assert torch.equal(torch.get_rng_state(), before)
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *a, **k: real(q, *a, **k) * (1 + q.is_nested))
    assert not works(*given)
    still = lambda q, *a, **k: real(q, *a, **({**k, "dropout_p": 0.0} if q.is_nested else k))  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", still)
    assert not works(*given), "a kernel without dropout"

    def none(q, *a, **k):
        if q.is_nested:
            raise RuntimeError("no kernel for this")
        return real(q, *a, **k)

    monkeypatch.setattr(F, "scaled_dot_product_attention", none)
    assert not works(*given)
    assert "no kernel for this" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_has_a_kernel_for_nested_rows(dtype):
    assert packing._nested_attention_works(torch.device("cuda", 0), dtype, 64)
    rows = packed([300, 9, 9])
    assert (
        packing.choose_attention(torch.zeros(1, 2, 318, 64, device="cuda", dtype=dtype), rows, AttentionSettings())
        is attend_nested
    )
