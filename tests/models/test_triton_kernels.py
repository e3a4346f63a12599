"""The Triton kernels are the reference in value, mask and gradient: in the interpreter on a CPU, compiled on a GPU.

Without a GPU: ``make test-triton``, which sets ``TRITON_INTERPRET=1``, in an environment that has Triton.
"""

import random

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tercet.models.engine.deterministic_dropout import apply_dropout
from tercet.models.engine.packing import AttentionSettings, Packing, attend_by_length
from tercet.models.engine.triton_kernels import available, seeded_dropout, short_attention
from tercet.rng import derive_seed
from tercet.types import TokenBatch

needs_triton = pytest.mark.skipif(not available(torch.device("cpu")), reason="needs Triton, and TRITON_INTERPRET=1")
DEVICES = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=needs_triton), pytest.param("cuda", marks=pytest.mark.gpu)]
)
NUMBER = 7
PADDING = 5  # tokens of no row, at the end


@pytest.fixture(autouse=True)
def what_no_kernel_wrote_is_not_a_number():
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory
    yield
    torch.use_deterministic_algorithms(False)


def seeds(*shape, device):
    draw = torch.Generator().manual_seed(3)
    return torch.randint(-(1 << 63), (1 << 63) - 1, shape, generator=draw).to(device)


@DEVICES
@pytest.mark.parametrize("number", [None, 0, 1, NUMBER])
@pytest.mark.parametrize(("shape", "dtype", "p"), [
    ((2, 5, 64), torch.float32, 0.1), ((37, 6), torch.float32, 0.5), ((3, 769), torch.bfloat16, 0.9),
    ((9, 32), torch.float16, 0), ((0, 8), torch.float32, 0.1), ((4, 8), torch.float32, 1.0), ((700, 24), torch.float16, 0.1),
])  # fmt: skip
def test_dropout_has_the_references_mask_value_and_gradient(shape, dtype, p, number, device):
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    slope = torch.randn(shape, device=device).to(dtype)
    seed = seeds(*shape[:-1], device=device)
    got = seeded_dropout(x, p, seed, number)
    want = apply_dropout(x, p, seed if number is None else derive_seed(seed, number))
    truncates = device == "cpu" and dtype == torch.bfloat16  # Triton's interpreter does not round
    for a, b in ((got, want), (torch.autograd.grad(out, x, slope)[0] for out in (got, want))):
        torch.testing.assert_close(a, b, rtol=2**-7 if truncates else 0, atol=0)


@DEVICES
def test_dropout_takes_any_strides(device):
    x, seed = torch.randn(12, 6, device=device).T, seeds(6, 2, device=device)[:, 0]
    assert torch.equal(seeded_dropout(x, 0.5, seed), apply_dropout(x, 0.5, seed))


def inputs(lengths, heads, d, device, dtype=torch.float32, padding=PADDING):
    """Query, key and value as views of one projection, and row starts; tokens of no row are not a number."""
    total = sum(lengths) + padding
    mixed = torch.randn(total, 3, heads, d, generator=torch.Generator().manual_seed(0))
    mixed[sum(lengths) :] = torch.nan
    qkv = [x.detach().requires_grad_() for x in mixed.to(device, dtype).unbind(1)]
    rows = torch.tensor(lengths, device=device, dtype=torch.long)
    return qkv, rows.cumsum(0) - rows, rows


def reference(q, k, v, lengths, first_only, window=None, p=0.0, seed=None, attend=None, number=None, scale=None):
    """Each row alone, in torch; 0 for what belongs to no row."""
    real, places = sum(lengths), torch.tensor([n > 0 for n in lengths], device=q.device, dtype=torch.bool)
    keep = places if first_only else slice(real)
    index = TokenBatch(q.new_zeros(sum(lengths)), torch.tensor([n for n in lengths if n])).index
    rows = Packing(index, attend=None if attend is None else attend[:real])
    seed = seed if seed is None or number is None else derive_seed(seed, number)
    settings = AttentionSettings(p, scale, window, None if seed is None else seed[keep][None])
    if seed is None and attend is not None:  # torch's attention gives 0 where nothing is seen
        settings = settings._replace(seed=torch.zeros(1, len(q[keep]), dtype=torch.long, device=q.device), dropout=0.0)
    parts = (x.transpose(0, 1)[None] for x in (q[keep], k[:real], v[:real]))
    out = torch.zeros_like(q)
    out[keep] = attend_by_length(*parts, rows, settings)[0]
    return out


def compare(
    lengths, longest, heads, d, device, dtype=torch.float32, first_only=False, masked=False, padding=PADDING, **options
):
    (q, k, v), starts, rows = inputs(lengths, heads, d, device, dtype, padding)
    if first_only:
        first = torch.where(rows > 0, starts, 0)
        q = torch.where(rows[:, None, None] > 0, q[first], torch.nan).detach().requires_grad_()
    options["seed"] = seeds(len(q), device=device) if options.get("p") else None
    if masked:
        attend = torch.rand(len(k), generator=torch.Generator().manual_seed(1)) < 0.6
        attend[: lengths[0]] = False  # a row that sees nothing
        options["attend"] = attend.to(device)
    got = short_attention(q, k, v, starts, rows, longest, first_only=first_only, **options)
    want = reference(*(x.float() for x in (q, k, v)), lengths, first_only, **options).to(dtype)
    assert got.dtype == dtype
    slope = torch.randn(got.shape, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    gradients = [torch.autograd.grad(out, (q, k, v), slope) for out in (got, want)]
    close = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    for a, b in [(got, want), *zip(*gradients, strict=True)]:
        torch.testing.assert_close(a, b.nan_to_num(), rtol=close, atol=close)


def row_lengths(longest, n=4):
    draw = random.Random(longest)
    return [draw.randint(1, longest) for _ in range(n - 1)] + [longest]


@DEVICES
@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize(("longest", "heads", "d"), [(8, 12, 32), (17, 2, 64), (32, 3, 48), (64, 1, 64), (128, 1, 32)])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_attention_is_each_row_alone(longest, heads, d, p, first_only, device):
    compare(row_lengths(longest), longest, heads, d, device, first_only=first_only, p=p)


CASES = {
    "empty rows": {"lengths": [0, 3, 0, 9, 0, 0]},
    "masked keys": {"masked": True, "p": 0.1},
    "masked keys, nothing dropped": {"masked": True},
    "many tokens of no row": {"lengths": [3, 1], "padding": 70},
    "a window": {"window": 3, "p": 0.1},
    "a window and masked keys": {"window": 3, "masked": True},
    "a module's number": {"number": NUMBER, "p": 0.5},
    "number 1": {"number": 1, "p": 0.5},
    "a scale": {"scale": 0.5},
    "longest beyond every row": {"longest": 40, "p": 0.1},
}


@DEVICES
@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_attention_in_special_cases(case, first_only, device):
    compare(
        **{"lengths": [7, 3, 12, 1], "longest": 12, "heads": 2, "d": 16, **CASES[case]}, first_only=first_only, device=device
    )


@DEVICES
@pytest.mark.parametrize("first_only", [False, True])
def test_without_rows_all_is_zero(first_only, device):
    (q, k, v), starts, rows = inputs([], 2, 16, device)
    q = q[:0] if first_only else q
    out = short_attention(q, k, v, starts, rows, 0, first_only=first_only)
    assert all(not x.count_nonzero() for x in (out, *torch.autograd.grad(out.sum(), (q, k, v))))


@DEVICES
@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16])  # bf16 below: Triton's interpreter has no product of it
def test_attention_in_half_precision(dtype, first_only, device):
    compare(row_lengths(20), 20, 2, 64, device, dtype, first_only, p=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize(("longest", "d", "dtype"), [
    *((longest, 64, torch.bfloat16) for longest in (16, 32, 64, 128)), (128, 32, torch.bfloat16), (64, 96, torch.bfloat16),
    (128, 128, torch.bfloat16), (128, 128, torch.float32),
])  # fmt: skip
def test_every_block_compiles_and_fits_the_chip(longest, d, dtype, first_only):
    if not available(torch.device("cuda"), longest, d):
        pytest.skip("does not fit into this GPU's shared memory")
    compare(row_lengths(longest, 50), longest, 12, d, "cuda", dtype, first_only, p=0.1, number=NUMBER)


@DEVICES
@pytest.mark.parametrize("length", [13, 32, 128])
def test_attention_drops_what_the_reference_drops_bit_for_bit(length, device):
    heads = 3
    zero = torch.zeros(length, heads, length, device=device)
    value = torch.eye(length, device=device)[:, None].expand(-1, heads, -1).contiguous()
    seed, row = seeds(length, device=device), torch.tensor([length], device=device)
    got = short_attention(zero, zero, value, row * 0, row, length, p=0.5, seed=seed, number=NUMBER)  # (query, head, key)
    want = derive_seed(derive_seed(seed, NUMBER)[:, None], torch.arange(heads, device=device))
    assert torch.equal(got != 0, apply_dropout(torch.ones_like(got), 0.5, want) != 0)


@DEVICES
def test_attention_takes_heads_before_tokens_and_what_it_gives_can_be_recomputed(device):
    lengths = [4, 9]
    qkv, starts, rows = inputs(lengths, 2, 16, device)
    qkv = [x.transpose(0, 1).contiguous().transpose(0, 1).detach().requires_grad_() for x in qkv]
    options = {"p": 0.5, "seed": seeds(len(qkv[0]), device=device)}

    def call(q, k, v):
        return short_attention(q, k, v, starts, rows, 9, **options)

    got, want = checkpoint(call, *qkv, use_reentrant=False), reference(*qkv, lengths, False, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    slopes = [torch.autograd.grad(out.square().sum(), qkv) for out in (got, want)]
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b.nan_to_num(), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_graph_replays_both_kernels():
    (q, k, v), starts, rows = inputs([5, 12, 30], 4, 32, "cuda", torch.bfloat16)
    seed = seeds(len(q), device="cuda")

    def step():
        out = short_attention(q, k, v, starts, rows, 32, p=0.1, seed=seed, number=NUMBER)
        out = seeded_dropout(out.flatten(1), 0.1, seed, NUMBER)
        return out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    for shift in (0, 1):
        seed.add_(shift)
        graph.replay()
        assert all(map(torch.equal, replayed, step()))


@DEVICES
def test_what_does_not_fit_into_a_block_is_not_available(device):
    device = torch.device(device)
    assert available(device) and available(device, 128, 64)
    assert not available(device, 129, 64) and not available(device, 16, 129)


def test_arguments_that_do_not_fit_are_refused():
    (q, k, v), starts, rows = inputs([3, 2], 2, 16, "cpu")
    for wrong in ({"longest": 129}, {"p": 0.1}, {"first_only": True}, {"p": 0.1, "seed": starts}):
        with pytest.raises(ValueError):
            short_attention(q, k, v, starts, rows, **{"longest": 3, **wrong})
    with pytest.raises(ValueError, match="dtype"):
        short_attention(q, k.half(), v.half(), starts, rows, 3)
    with pytest.raises(ValueError, match="seeds"):
        seeded_dropout(q, 0.1, starts)
