"""Triton kernels of dropout by seed and of attention within short rows; ``triton_kernels`` imports this where Triton is."""

import triton
import triton.language as tl

from tercet.rng import BITS, FIRST, GOLDEN, SECOND

# Triton reads globals only where they are of this type.
ADD, MULTIPLY_FIRST, MULTIPLY_SECOND = tl.constexpr(GOLDEN), tl.constexpr(FIRST), tl.constexpr(SECOND)
MASK_34, MASK_37, MASK_33 = (tl.constexpr((1 << bits) - 1) for bits in (34, 37, 33))
DRAW, SIGN = tl.constexpr(BITS - 1), tl.constexpr(BITS // 2)
LEAST = tl.constexpr(-3.4028234663852886e38)  # the least float32


@triton.jit
def derive(seed, number):
    """The same as ``rng.derive_seed``: int64 both, broadcast."""
    x = seed + (number + 1) * ADD
    x = (x ^ ((x >> 30) & MASK_34)) * MULTIPLY_FIRST
    x = (x ^ ((x >> 27) & MASK_37)) * MULTIPLY_SECOND
    return x ^ ((x >> 31) & MASK_33)


@triton.jit
def keeps(bits, place, threshold):
    """Whether dropout keeps an element: its draw is the 16 bits at ``place`` (0 to 3) of ``bits``, as in ``apply_dropout``."""
    draw = (bits >> (place * 16)).to(tl.int32)
    return ((draw & DRAW) ^ SIGN) >= threshold


@triton.jit(do_not_specialize=["draws", "number", "threshold"])
def dropout(x, out, seeds, draws, number, threshold, scale, H: tl.constexpr, BLOCK: tl.constexpr):
    """``apply_dropout`` on ``(rows, H)``: each of ``draws`` 64-bit numbers decides on four elements."""
    quarters: tl.constexpr = (H + 3) // 4
    draw = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = draw // quarters
    quarter = draw % quarters
    seed = tl.load(seeds + row, mask=draw < draws, other=0)
    if number is not None:
        seed = derive(seed, number.to(tl.int64))
    bits = derive(seed, quarter.to(tl.int64))
    place = tl.arange(0, 4)
    column = quarter[:, None] * 4 + place[None, :]
    inside = (draw < draws)[:, None] & (column < H)
    offset = row.to(tl.int64)[:, None] * H + column
    kept = keeps(bits[:, None], place.to(tl.int64)[None, :], threshold)
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offset, tl.where(kept, value * scale, 0.0).to(out.dtype.element_ty), mask=inside)


@triton.jit
def load_vectors(vectors, token, stride, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The vectors of ``token (n,)``, 0 where ``valid`` is false: ``(n, BLOCK_D)``."""
    column = tl.arange(0, BLOCK_D)[None, :]
    return tl.load(vectors + token[:, None] * stride + column, mask=valid[:, None] & (column < D), other=0.0)


@triton.jit
def store_vectors(vectors, value, token, stride, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write ``value (n, BLOCK_D)`` where ``load_vectors`` reads."""
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = valid[:, None] & (column < D)
    tl.store(vectors + token[:, None] * stride + column, value.to(vectors.dtype.element_ty), mask=inside)


@triton.jit
def clear_rest(
    vectors, row, rows, end, tokens, D: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr
):
    """Write 0 for the tokens from ``end`` on, which belong to no row: every row's program takes its share."""
    zero = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for first in range(end + row * BLOCK, tokens.to(tl.int64), rows.to(tl.int64) * BLOCK):
        token = first + tl.arange(0, BLOCK)
        store_vectors(vectors, zero, token, HEADS * D, token < tokens, D, BLOCK_D)


@triton.jit
def clear_empty(vectors, row, length, D: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """Write 0 for the only query of a row without tokens."""
    i = tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    store_vectors(vectors, zero, row + i, HEADS * D, (i == 0) & (i >= length), D, BLOCK_D)  # of 0 tokens


@triton.jit
def softmax(q, k, i, start, length, attend, scale, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """Probabilities ``(queries, BLOCK)`` of a row's keys, float32, and which of the keys are seen."""
    j = tl.arange(0, BLOCK)
    within = (j < length)[None, :]
    seen = within & (i >= 0)[:, None]
    if attend is not None:
        seen = seen & (tl.load(attend + start + j, mask=j < length, other=0) != 0)[None, :]
    if WINDOW is not None:
        seen = seen & (tl.abs(i[:, None] - j[None, :]) < WINDOW)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(seen, scores, LEAST)  # a row without any seen key attends to all its keys alike
    scores = tl.where(within, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None], seen


@triton.jit
def keeps_keys(seeds, query, valid, number, head, threshold, BLOCK: tl.constexpr):
    """Whether dropout keeps the probability of each of ``BLOCK`` keys, for each of ``query``: ``(queries, BLOCK)``."""
    seed = tl.load(seeds + query, mask=valid, other=0)
    if number is not None:
        seed = derive(seed, number.to(tl.int64))
    seed = derive(seed, head)
    bits = derive(seed[:, None], tl.arange(0, BLOCK // 4).to(tl.int64)[None, :])
    kept = keeps(bits[:, :, None], tl.arange(0, 4).to(tl.int64)[None, None, :], threshold)
    return tl.reshape(kept, (query.shape[0], BLOCK))


@triton.jit
def program_rows(starts, lengths, HEADS: tl.constexpr, FIRST_ONLY: tl.constexpr):
    """The row and head of a program, the row's first token and length; its first query and their number."""
    row = (tl.program_id(0) // HEADS).to(tl.int64)
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    start = tl.load(starts + row).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    queries = length
    first = start
    if FIRST_ONLY:
        queries = tl.minimum(length, 1)
        first = row
    return row, head, start, length, first, queries


@triton.jit(do_not_specialize=["rows", "tokens", "number", "threshold"])
def attention_forward(
    q, k, v, out, starts, lengths, attend, seeds,
    rows, tokens, number, threshold, keep_scale, scale,
    q_token, q_head, k_token, k_head, v_token, v_head,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr,
    WINDOW: tl.constexpr, FIRST_ONLY: tl.constexpr,
):  # fmt: skip
    """One program for each row and head: its keys are one block, its queries blocks of ``BLOCK_Q``."""
    row, head, start, length, first, queries = program_rows(starts, lengths, HEADS, FIRST_ONLY)
    j = tl.arange(0, BLOCK)
    keys = load_vectors(k + head * k_head, start + j, k_token, j < length, D, BLOCK_D)
    values = load_vectors(v + head * v_head, start + j, v_token, j < length, D, BLOCK_D)
    for block in range(0, queries, BLOCK_Q):
        i = block + tl.arange(0, BLOCK_Q)
        valid = i < queries
        query = load_vectors(q + head * q_head, first + i, q_token, valid, D, BLOCK_D)
        p, _ = softmax(query, keys, i, start, length, attend, scale, BLOCK, WINDOW)
        if seeds is not None:
            kept = keeps_keys(seeds, first + i, valid, number, head, threshold, BLOCK)
            p = tl.where(kept, p * keep_scale, 0.0)
        result = tl.dot(p.to(values.dtype), values, input_precision="ieee")
        store_vectors(out + head * D, result, first + i, HEADS * D, valid, D, BLOCK_D)
    if FIRST_ONLY:
        clear_empty(out + head * D, row, length, D, HEADS, BLOCK_D, BLOCK_Q)
    else:
        end = tl.load(starts + rows - 1).to(tl.int64) + tl.load(lengths + rows - 1)
        clear_rest(out + head * D, row, rows, end, tokens, D, HEADS, BLOCK_D, BLOCK)


@triton.jit(do_not_specialize=["rows", "tokens", "number", "threshold"])
def attention_backward(
    q, k, v, d_out, d_q, d_k, d_v, starts, lengths, attend, seeds,
    rows, tokens, number, threshold, keep_scale, scale,
    q_token, q_head, k_token, k_head, v_token, v_head,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr,
    WINDOW: tl.constexpr, FIRST_ONLY: tl.constexpr,
):  # fmt: skip
    """Gradients of ``attention_forward``; probabilities and what is dropped are computed again."""
    row, head, start, length, first, queries = program_rows(starts, lengths, HEADS, FIRST_ONLY)
    j = tl.arange(0, BLOCK)
    keys = load_vectors(k + head * k_head, start + j, k_token, j < length, D, BLOCK_D)
    values = load_vectors(v + head * v_head, start + j, v_token, j < length, D, BLOCK_D)
    d_keys = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    d_values = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for block in range(0, queries, BLOCK_Q):
        i = block + tl.arange(0, BLOCK_Q)
        valid = i < queries
        query = load_vectors(q + head * q_head, first + i, q_token, valid, D, BLOCK_D)
        gradient = load_vectors(d_out + head * D, first + i, HEADS * D, valid, D, BLOCK_D)
        p, seen = softmax(query, keys, i, start, length, attend, scale, BLOCK, WINDOW)
        d_p = tl.dot(gradient, tl.trans(values), input_precision="ieee")
        dropped = p
        if seeds is not None:
            kept = keeps_keys(seeds, first + i, valid, number, head, threshold, BLOCK)
            dropped = tl.where(kept, p * keep_scale, 0.0)
            d_p = tl.where(kept, d_p * keep_scale, 0.0)
        d_values += tl.dot(tl.trans(dropped.to(gradient.dtype)), gradient, input_precision="ieee")
        d_scores = p * (d_p - tl.sum(p * d_p, 1)[:, None])
        d_scores = (tl.where(seen, d_scores, 0.0) * scale).to(query.dtype)
        d_keys += tl.dot(tl.trans(d_scores), query, input_precision="ieee")
        d_query = tl.dot(d_scores, keys, input_precision="ieee")
        store_vectors(d_q + head * D, d_query, first + i, HEADS * D, valid, D, BLOCK_D)
    store_vectors(d_k + head * D, d_keys, start + j, HEADS * D, j < length, D, BLOCK_D)
    store_vectors(d_v + head * D, d_values, start + j, HEADS * D, j < length, D, BLOCK_D)
    end = tl.load(starts + rows - 1).to(tl.int64) + tl.load(lengths + rows - 1)
    clear_rest(d_k + head * D, row, rows, end, tokens, D, HEADS, BLOCK_D, BLOCK)
    clear_rest(d_v + head * D, row, rows, end, tokens, D, HEADS, BLOCK_D, BLOCK)
    if FIRST_ONLY:
        clear_empty(d_q + head * D, row, length, D, HEADS, BLOCK_D, BLOCK_Q)
    else:
        clear_rest(d_q + head * D, row, rows, end, tokens, D, HEADS, BLOCK_D, BLOCK)
