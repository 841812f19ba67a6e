"""The kernels of triton_decode.py: what one program of the GPU computes.

One of the modelling files that travel with every converted checkpoint. ``attend`` gives every program some of the
cached tokens (split-KV, as in Flash-Decoding) and up to 64 or 128 rows, a row being a head of a new token, which all
read the same tile. ``combine`` merges the parts by the logarithms of their sums.

Shapes: H rows of a program, N tokens of its tile, r latent rank, K rope pairs, n coefficients.
"""

from .code_layout import GRID_SCALE, LEFT, MASK, SHIFT, TOKEN_SCALE

try:  # transformers would ask a checkpoint's user for a package that is imported elsewhere
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the decode kernel needs the package triton") from missing

LEAST = tl.constexpr(-3.4028234663852886e38)  # of float32: no score is below it
LOWEST = tl.constexpr(-1.7014117331926443e38)  # what a mask may add at most, as in absorbed.additive_mask
_SHIFT, _LEFT, _MASK = tl.constexpr(SHIFT), tl.constexpr(LEFT), tl.constexpr(MASK)
_GRID, _TOKEN = tl.constexpr(GRID_SCALE), tl.constexpr(TOKEN_SCALE)


@triton.jit
def _cut(rows, piece, inside):
    """The bits [N,n] of each row that a piece [1,n] names; of piece 0 nothing is read: rows may have no bytes."""
    found = tl.load(rows + (piece & 0xFFFF), mask=inside & (piece != 0), other=0).to(tl.int32)
    return ((found >> ((piece >> _SHIFT) & 7)) & (piece >> _MASK)) << ((piece >> _LEFT) & 15)


@triton.jit
def _half(rows, at, inside):
    """The float16 whose first byte is ``at``; a row may start at an odd byte."""
    low = tl.load(rows + at, mask=inside, other=0).to(tl.uint16)
    high = tl.load(rows + at + 1, mask=inside, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _decoded(rows, dims, inside, used, WIDTH: tl.constexpr, FORM: tl.constexpr, places, levels):
    """Coefficients ``dims`` [1,n] of the tokens whose ``rows`` [N,1] of bytes begin here: codecs.py."""
    start = tl.load(places + 2 * WIDTH + dims, mask=used, other=-1)
    code = _cut(rows, tl.load(places + dims, mask=used, other=0), inside)
    if FORM[1]:
        code |= _cut(rows, tl.load(places + WIDTH + dims, mask=used, other=0), inside)
    known = (start >= 0) & inside
    states = tl.load(levels + start + code, mask=known, other=0.0).to(tl.float32)
    if FORM[3] == _GRID:
        states *= _half(rows, dims // FORM[4] * 2, known)
    if FORM[3] == _TOKEN:
        zero, scale = _half(rows, 2 * FORM[5], inside), _half(rows, 2 * FORM[5] + 2, inside)
        states = tl.where(known, states * scale + zero, 0.0)
    if FORM[2]:
        halves = code.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        states = tl.where(start < 0, halves, states)
    for index in tl.static_range(FORM[5]):
        place = tl.load(rows + 2 * index, mask=inside, other=0).to(tl.int32)
        place |= tl.load(rows + 2 * index + 1, mask=inside, other=0).to(tl.int32) << 8
        exact = _half(rows, 2 * (FORM[5] + 2 * (FORM[3] == _TOKEN) + index), inside)
        states = tl.where(place == dims, exact, states)
    return states


@triton.jit
def _read(rows, dims, inside, WIDTH: tl.constexpr, FORM: tl.constexpr, places, levels):
    """Numbers [N,n] of some tokens; zero beyond the row."""
    used = dims < WIDTH
    if FORM[0]:
        states = _decoded(rows, dims, inside, used, WIDTH, FORM, places, levels)
    else:
        states = tl.load(rows + dims, mask=inside & used, other=0.0)
    return states


@triton.jit
def _product(a, b, sums, DTYPE: tl.constexpr, WIDENED: tl.constexpr):
    """``sums`` and the product of a and b, rounded to DTYPE; the interpreter takes bfloat16 for integers."""
    a, b = a.to(DTYPE), b.to(DTYPE)
    if WIDENED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def _rope_scores(
    scores, real, imag, rows, inside, tile, turns, R: tl.constexpr, K: tl.constexpr, FORM: tl.constexpr,
    TURN: tl.constexpr, N: tl.constexpr, places, levels, DTYPE: tl.constexpr, WIDENED: tl.constexpr,
):  # fmt: skip
    """``scores`` [rows,N] and what rope adds, of queries [rows,K], real and imaginary parts; TURN: turns keys first."""
    HALF: tl.constexpr = (R + 1) // 2
    pairs = tl.arange(0, K)[None, :]
    both = pairs < HALF
    key_real = _read(rows, tl.where(both, pairs, R), inside, R, FORM, places, levels)
    key_imag = _read(rows, tl.where(both, HALF + pairs, R), inside, R, FORM, places, levels)
    if TURN:
        at = tl.arange(0, N)[:, None] * HALF + pairs
        cos, sin = tl.load(turns[2] + at, mask=both, other=1.0), tl.load(turns[3] + at, mask=both, other=0.0)
        key_real, key_imag = key_real * cos - key_imag * sin, key_imag * cos + key_real * sin
        at = tile * HALF + pairs  # the tile's first column turns the queries, the other way
        cos, sin = tl.load(turns[0] + at, mask=both, other=1.0), tl.load(turns[1] + at, mask=both, other=0.0)
        real, imag = real * cos + imag * sin, imag * cos - real * sin
    scores = _product(real, tl.trans(key_real), scores, DTYPE, WIDENED)
    return _product(imag, tl.trans(key_imag), scores, DTYPE, WIDENED)


@triton.jit
def _shown(scores, mask, columns, kept, MASKED: tl.constexpr):
    """Scores with a bool or an additive mask at the pointers ``mask`` [rows,N]."""
    if MASKED == 1:
        scores = tl.where(tl.load(mask, mask=kept, other=1) != 0, scores, scores + LOWEST)
    if MASKED == 2:
        scores += tl.maximum(tl.load(mask, mask=kept, other=0.0).to(tl.float32), LOWEST)
    return scores


@triton.jit
def attend(
    query, query_rope, latent, rope, latent_places, latent_levels, rope_places, rope_levels, turns, mask, left_out,
    left, parts, totals, scale, softcap, heads_new, new, length, per_split, latent_strides, rope_strides, mask_strides,
    RANK: tl.constexpr, ROPE: tl.constexpr, LATENT_FORM: tl.constexpr, ROPE_FORM: tl.constexpr, TURN: tl.constexpr,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr, WIDENED: tl.constexpr,
):  # fmt: skip
    """Attention of H rows to the tokens of one split: sums [H,r] over their weights, and the weights' logarithm."""
    split, splits, batch = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    DTYPE: tl.constexpr = query.dtype.element_ty
    row, dims, pairs = tl.program_id(0) * H + tl.arange(0, H), tl.arange(0, R), tl.arange(0, K)
    real_row = row < heads_new
    at = batch * heads_new + row
    q = tl.load(query + at[:, None] * RANK + dims, mask=real_row[:, None] & (dims < RANK), other=0.0)
    half: tl.constexpr = (ROPE + 1) // 2
    if ROPE:
        ropes = query_rope + at[:, None] * ROPE + pairs
        real = tl.load(ropes, mask=real_row[:, None] & (pairs < half), other=0.0).to(tl.float32)
        imag = tl.load(ropes + half, mask=real_row[:, None] & (pairs < ROPE - half), other=0.0).to(tl.float32)
    latent += batch * latent_strides[0]
    rope += batch * rope_strides[0]
    mask_rows = mask + batch * mask_strides[0] + (row // new)[:, None] * mask_strides[1]
    mask_rows += (row % new)[:, None] * mask_strides[2]
    peak, total = tl.full([H], LEAST, tl.float32), tl.zeros([H], tl.float32)
    sums = tl.zeros([H, R], tl.float32)
    for first in range(split * per_split, min(length, (split + 1) * per_split), N):
        columns = first + tl.arange(0, N)
        inside = columns < length
        kept = inside
        for index in range(left):
            kept &= columns != tl.load(left_out + batch * left + index)
        wide = columns.to(tl.int64)[:, None]
        c = _read(
            latent + wide * latent_strides[1], dims[None, :], inside[:, None], RANK, LATENT_FORM, latent_places,
            latent_levels,
        ).to(DTYPE)  # fmt: skip
        scores = _product(q, tl.trans(c), tl.zeros([H, N], tl.float32), DTYPE, WIDENED)
        if ROPE:
            scores = _rope_scores(
                scores, real, imag, rope + wide * rope_strides[1], inside[:, None], first // N, turns, ROPE, K,
                ROPE_FORM, TURN, N, rope_places, rope_levels, DTYPE, WIDENED,
            )  # fmt: skip
        scores *= scale
        if CAPPED:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)  # softcap tanh(scores / softcap)
        seen = real_row[:, None] & kept[None, :]
        scores = _shown(scores, mask_rows + wide.reshape(1, N) * mask_strides[3], columns, seen, MASKED)
        scores = tl.where(kept[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights, less = tl.exp(scores - higher[:, None]), tl.exp(peak - higher)
        peak, total = higher, total * less + tl.sum(weights, 1)
        sums = _product(weights, c, sums * less[:, None], DTYPE, WIDENED)
    at = at * splits + split
    tl.store(totals + at, peak + tl.log(total), mask=real_row)
    sums /= tl.maximum(total, 1e-37)[:, None]
    tl.store(parts + at[:, None] * RANK + dims, sums, mask=real_row[:, None] & (dims < RANK))


@triton.jit
def combine(
    parts, totals, sinks, context, log_totals, splits, new, heads, RANK: tl.constexpr, R: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """One row's parts, each with its share of the one softmax; a sink takes a share, too."""
    row, dims = tl.program_id(0).to(tl.int64), tl.arange(0, R)
    peak, total, sums = tl.full([R], LEAST, tl.float32), tl.zeros([R], tl.float32), tl.zeros([R], tl.float32)
    if SINKS:
        peak, total = total + tl.load(sinks + row // new % heads).to(tl.float32), total + 1.0
    for split in range(splits):
        at = row * splits + split
        found = tl.load(totals + at)
        higher = tl.maximum(peak, found)
        less, share = tl.exp(peak - higher), tl.exp(found - higher)
        peak, total = higher, total * less + share
        part = tl.load(parts + at * RANK + dims, mask=dims < RANK, other=0.0)
        sums = sums * less + share * part
    tl.store(log_totals + row, tl.max(peak + tl.log(total), 0))
    sums /= tl.maximum(total, 1e-37)
    tl.store(context + row * RANK + dims, sums, mask=dims < RANK)
