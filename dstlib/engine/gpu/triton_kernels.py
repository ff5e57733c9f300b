"""The Triton kernels: a gathered matrix product over the taps of a convolution, and over the voxels of a map.

Shapes: P positions (batch · depth · height · width), K entries of a table, T taps, N columns of a row. Maps lie
channels last, (P, channels); weights are (K, T, N). ``size`` is a Size and FORM a Form of by_triton.py, which loads
this module when it first calls a kernel. Triton has to be there to call them.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped, import-not-found, no-redef"
# (Triton compiles these functions itself: what their arguments are is known at the call)

from __future__ import annotations

try:
    import triton.language as tl
    from triton import jit
except ImportError:  # tools that load every module, for doctests or documentation, can still read this one

    def jit(function):
        return function


@jit
def _reach(at, tap, size, EXTENT: tl.constexpr, STRIDE: tl.constexpr, BACKWARD: tl.constexpr):
    """Where a tap reads along one axis, and whether that lies inside."""
    if BACKWARD:
        moved = at + EXTENT // 2 - tap
        read = moved // STRIDE
        return read, (moved >= 0) & (moved % STRIDE == 0) & (read < size)
    read = at * STRIDE + tap - EXTENT // 2
    return read, (read >= 0) & (read < size)


@jit
def _gather(x, tables, p, span, tap, size, FORM: tl.constexpr):
    """What positions p see through a tap: (tile, chunk) of the channels of the entries from span[0] on."""
    col_idx, shifts = tables
    first, end = span
    w, row = p % size.out_width, p // size.out_width
    h, plane = row % size.out_height, row // size.out_height
    d, batch = plane % size.out_depth, plane // size.out_depth
    KH: tl.constexpr = FORM.kernel[1]
    KW: tl.constexpr = FORM.kernel[2]
    d, d_in = _reach(d, tap // (KH * KW), size.depth, FORM.kernel[0], FORM.stride[0], FORM.backward)
    h, h_in = _reach(h, tap // KW % KH, size.height, KH, FORM.stride[1], FORM.backward)
    w, w_in = _reach(w, tap % KW, size.width, KW, FORM.stride[2], FORM.backward)
    inside = (d_in & h_in & w_in & (p < size.positions))[:, None]
    CHUNK: tl.constexpr = FORM.chunk
    k = tl.arange(0, CHUNK)
    depth, plane = d[:, None], size.height * size.width
    if FORM.run:
        channel = tl.multiple_of(tl.load(col_idx + first), CHUNK) + k
        if FORM.shifted and not FORM.backward:
            depth -= tl.load(shifts + first)
        if FORM.ragged:
            inside &= (channel < FORM.channels)[None, :]
    else:
        listed = first + k < end
        channel = tl.load(col_idx + first + k, mask=listed, other=0)
        inside &= listed[None, :]
        if FORM.shifted and not FORM.backward:
            depth -= tl.load(shifts + first + k, mask=listed, other=0)[None, :]
    if FORM.shifted and not FORM.backward:
        inside &= (depth >= 0) & (depth < size.depth)
    voxel = (batch[:, None] * size.depth + depth) * plane + (h * size.width + w)[:, None]
    return tl.load(x + voxel.to(tl.int64) * FORM.channels + channel[None, :], mask=inside, other=0.0)


@jit
def _product(a, b, acc, FORM: tl.constexpr):
    if FORM.widen:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=FORM.precision)


@jit
def gather_gemm(x, weight, bias, y, tables, size, FORM: tl.constexpr):
    """y[p, r · N + n] = bias + sum over the entries k of row r, and taps t, of x[p at t, channel k] · weight[k, t, n].

    Backward, column c is written at depth d - moves[c]: the shift undone. What no column reaches is left.
    """
    row_ptr, col_idx, shifts, moves, num_rows = tables
    TAPS: tl.constexpr = FORM.kernel[0] * FORM.kernel[1] * FORM.kernel[2]
    TILE: tl.constexpr = FORM.tile
    LANES: tl.constexpr = FORM.lanes
    row = tl.program_id(0) % num_rows  # neighbours in time read the same voxels
    p = tl.program_id(0) // num_rows * TILE + tl.arange(0, TILE)
    n = tl.arange(0, LANES)
    begin, end = tl.load(row_ptr + row), tl.load(row_ptr + row + 1)
    acc = tl.zeros((TILE, LANES), tl.float32)
    for step in range(tl.cdiv(end - begin, FORM.chunk) * TAPS):
        tap, first = step % TAPS, begin + step // TAPS * FORM.chunk
        k = first + tl.arange(0, FORM.chunk)
        a = _gather(x, (col_idx, shifts), p, (first, end), tap, size, FORM)
        there = (k < end)[:, None] & (n < FORM.columns)[None, :]
        b = tl.load(weight + (k[:, None] * TAPS + tap) * FORM.columns + n[None, :], mask=there, other=0.0)
        acc = _product(a, b, acc, FORM)
    column = row * FORM.columns + n
    exists = (n < FORM.columns) & (column < FORM.outputs)
    if bias is not None:
        acc += tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)[None, :]
    stored = (p < size.positions)[:, None] & exists[None, :]
    voxel = p[:, None].to(tl.int64)
    if FORM.backward and FORM.shifted:
        plane = size.out_height * size.out_width
        move = tl.load(moves + column, mask=exists, other=0)[None, :]
        depth = (p // plane % size.out_depth)[:, None] - move
        stored &= (depth >= 0) & (depth < size.out_depth)
        voxel = voxel - move * plane
    tl.store(y + voxel * FORM.outputs + column[None, :], acc.to(y.dtype.element_ty), mask=stored)


@jit
def gather_gemm_weights(x, grad, out, tables, size, FORM: tl.constexpr):
    """out[s, k, t, n] = sum over every s-th tile of positions p of x[p at t, channel k] · grad[p, r · N + n]."""
    row_ptr, col_idx, shifts, chunks, num_entries = tables
    TAPS: tl.constexpr = FORM.kernel[0] * FORM.kernel[1] * FORM.kernel[2]
    CHUNK: tl.constexpr = FORM.chunk
    LANES: tl.constexpr = FORM.lanes
    tap, share = tl.program_id(0), tl.program_id(2)
    row, first = tl.load(chunks + 2 * tl.program_id(1)), tl.load(chunks + 2 * tl.program_id(1) + 1)
    end = tl.load(row_ptr + row + 1)
    n = tl.arange(0, FORM.lanes)
    column = row * FORM.columns + n
    exists = (n < FORM.columns) & (column < FORM.outputs)
    acc = tl.zeros((CHUNK, LANES), tl.float32)
    for begin in range(share * FORM.tile, size.positions, tl.num_programs(2) * FORM.tile):
        p = begin + tl.arange(0, FORM.tile)
        a = _gather(x, (col_idx, shifts), p, (first, end), tap, size, FORM)
        there = (p < size.positions)[:, None] & exists[None, :]
        b = tl.load(grad + p[:, None].to(tl.int64) * FORM.outputs + column[None, :], mask=there, other=0.0)
        acc = _product(tl.trans(a), b, acc, FORM)
    k = first + tl.arange(0, FORM.chunk)
    at = ((share * num_entries + k[:, None]).to(tl.int64) * TAPS + tap) * FORM.columns + n[None, :]
    tl.store(out + at, acc, mask=(k < end)[:, None] & (n < FORM.columns)[None, :])


@jit
def add_terms(sums, y, terms, positions, FORM: tl.constexpr):
    """y[p, c] = sum over j of sums[p, terms[c, j]]; always in this order."""
    TILE: tl.constexpr = FORM.tile
    LANES: tl.constexpr = FORM.lanes
    p = tl.program_id(0) * TILE + tl.arange(0, TILE)
    c = tl.program_id(1) * LANES + tl.arange(0, LANES)
    there = (p < positions)[:, None] & (c < FORM.channels)[None, :]
    total = tl.zeros((TILE, LANES), tl.float32)
    for j in range(FORM.most):
        term = tl.load(terms + c * FORM.most + j, mask=c < FORM.channels, other=-1)
        at = p[:, None].to(tl.int64) * FORM.sums + term[None, :]
        total += tl.load(sums + at, mask=there & (term >= 0)[None, :], other=0.0)
    at = p[:, None].to(tl.int64) * FORM.channels + c[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=there)
