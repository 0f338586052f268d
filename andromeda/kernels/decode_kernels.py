"""The Triton kernels of decode.py: flash-decoding (Dao et al. 2023) over pages, with certified windows.

A fixed number of programs shares the work of the whole batch evenly, whatever the lengths. A unit is the keys that one
key/value head of one sequence must read, in tiles; the units stand in a row, and program p takes the p-th part of the
row (Stream-K, Osama et al. 2023). It leaves the softmax of what it saw of unit u, not yet divided by its sum, in slot
p + u: both only grow along the row, so no two meet. `merge_kernel` adds a unit's slots up.

The query heads of a unit come in two sets, heads below `CUT` (local ones, often rotated) and the others. A tile that
only one set sees costs that set's arithmetic alone.

Where a bound on the logits allows, the softmax needs no running maximum: a third of the barriers of a tile are left.

What is small and read by every call stays in the L2 cache (`KEEP`), which the keys and values would sweep away.

Rotated heads: a tile's anchor is its last key. Its keys are rotated by a table, a constant of the kernel, and the
queries by distance to the anchor, reduced to a turn in float64; every decay is at most that of a few new tokens.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda.libdevice import fast_cosf, fast_sinf

from andromeda.kernels.flash_forward import LOG2_E, MAX_BOUND, dot

TURN = tl.constexpr(6.283185307179586)
NO_WINDOW = tl.constexpr(2**31 - 1)
KEEP = tl.constexpr("evict_last")


@triton.jit
def _pick(values, index):
    """values[index]."""
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) == index, values, 0), axis=0)


@triton.jit
def _set_span(length, reach, N: tl.constexpr, BLOCK: tl.constexpr):
    """The first key and the first tile that a set of heads sees, given its longest window; 0: no such head."""
    first = tl.maximum(tl.maximum(length - N, 0) - reach + 1, 0)
    first = tl.where(reach > 0, first, length)
    return first, tl.where(reach > 0, first // BLOCK, tl.cdiv(length, BLOCK))


@triton.jit
def _units(
    lengths_ptr, windows_ptr, units, N: tl.constexpr, CUT: tl.constexpr, KV: tl.constexpr,
    GROUP: tl.constexpr, WINDOWED: tl.constexpr, BLOCK: tl.constexpr, FAR: tl.constexpr, NEAR: tl.constexpr,
    UNITS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """(UNITS,) length, first key, first tiles of both sets, and the end of each unit in the row of all work.

    A tile costs FAR where one set sees it, NEAR where both do.
    """
    unit = tl.arange(0, UNITS)
    real = unit < units
    length = tl.load(lengths_ptr + unit // KV, mask=real, other=0, eviction_policy=KEEP).to(tl.int32)
    kv = unit % KV
    below = tl.minimum(tl.maximum(CUT - kv * GROUP, 0), GROUP)  # heads of the unit that are of the first set
    if WINDOWED:
        member = tl.arange(0, MEMBERS)[None, :]
        mask = real[:, None] & (member < GROUP)
        window = tl.load(windows_ptr + kv[:, None] * GROUP + member, mask=mask, other=0, eviction_policy=KEEP)
        window = tl.minimum(window, NO_WINDOW).to(tl.int32)
        reach_a = tl.max(tl.where(member < below[:, None], window, 0), axis=1)
        reach_b = tl.max(tl.where(member < below[:, None], 0, window), axis=1)
    else:
        reach_a = tl.where(below > 0, NO_WINDOW, 0)
        reach_b = tl.where(below < GROUP, NO_WINDOW, 0)
    first_a, tile_a = _set_span(length, reach_a, N, BLOCK)
    first_b, tile_b = _set_span(length, reach_b, N, BLOCK)
    far = tl.maximum(tile_a, tile_b) - tl.minimum(tile_a, tile_b)
    near = tl.cdiv(length, BLOCK) - tl.maximum(tile_a, tile_b)
    end = tl.cumsum(FAR * far + NEAR * near, axis=0)
    return length, tl.minimum(first_a, first_b), tile_a, tile_b, end


@triton.jit
def _tile_at(cost, tile_a, tile_b, FAR: tl.constexpr, NEAR: tl.constexpr):
    """The tile of a unit that begins at or after this much of its cost."""
    lo = tl.minimum(tile_a, tile_b)
    hi = tl.maximum(tile_a, tile_b)
    far = FAR * (hi - lo)
    return tl.where(cost < far, lo + tl.cdiv(cost, FAR), hi + tl.cdiv(tl.maximum(cost - far, 0), NEAR))


@triton.jit
def _turned(x1, x2, distance, turns, decay, WIDEN: tl.constexpr):
    """Channel pairs (rows, pairs), rotated and decayed by integer `distance` (1 or rows, 1)."""
    angle = distance.to(tl.float64) * turns[None, :]
    angle = (angle - tl.floor(angle + 0.5)).to(tl.float32) * TURN
    if WIDEN:
        cos = tl.cos(angle)
        sin = tl.sin(angle)
    else:  # right to 2^-20.9 within half a turn, and without the branch for large angles
        cos = fast_cosf(angle)
        sin = fast_sinf(angle)
    scale = tl.exp2(distance.to(tl.float32) * decay[None, :])
    return (x1 * cos - x2 * sin) * scale, (x2 * cos + x1 * sin) * scale


@triton.jit
def _attend(state, q1, q2, k1, k2, v, j, rows, ONLINE: tl.constexpr, WIDEN: tl.constexpr):
    """One tile more in the softmax of a set: its accumulator, running maximum (base 2) and sums, a column a key.

    Without ONLINE the maximum stays at 0. The sums of a row are added up at the end: that costs barriers.
    """
    acc, top, sums = state
    position, slope, window = rows
    s = tl.zeros([q1.shape[0], k1.shape[0]], tl.float32)
    s = dot(q1.to(k1.dtype), tl.trans(k1), s, WIDEN)
    s = dot(q2.to(k2.dtype), tl.trans(k2), s, WIDEN)
    distance = position[:, None] - j[None, :]
    s = s * LOG2_E - slope[:, None] * distance.to(tl.float32)
    s = tl.where((distance >= 0) & (distance < window[:, None]), s, float("-inf"))
    if ONLINE:
        new_top = tl.maximum(top, tl.max(s, axis=1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        scale = tl.exp2(top - base)[:, None]
        acc = acc * scale
        sums = sums * scale
        top = new_top
        s -= base[:, None]
    p = tl.exp2(s).to(v.dtype)  # what is summed is what weighs the values, so rounding cancels where one key is all
    return dot(p, v, acc, WIDEN), top, sums + p.to(tl.float32)


@triton.jit
def _walk(
    state_a, state_b, lo, hi, queries_a, queries_b, rows_a, rows_b,
    pointers, strides, first, length, tables,
    N: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, A_ROTATED: tl.constexpr, B_ROTATED: tl.constexpr, ONLINE: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Tiles lo..hi - 1 of a unit, which set A, set B or both see."""
    k_ptr, v_ptr, pages_ptr = pointers
    stride_page, stride_key, stride_v_page, stride_v_key = strides
    cos_ptr, sin_ptr, turns_ptr, decay_ptr = tables
    key = tl.arange(0, BLOCK)
    channel = tl.arange(0, D)
    pair = tl.arange(0, D // 2)
    if (A and A_ROTATED) or (B and B_ROTATED):
        turns = tl.load(turns_ptr + pair, eviction_policy=KEEP)
        decay = tl.load(decay_ptr + pair, eviction_policy=KEEP)
    for tile in range(lo, hi):
        j = tile * BLOCK + key
        seen = ((j >= first) & (j < length))[:, None]  # what lies beyond may be anything, NaN too
        if PAGE >= BLOCK:
            page = tl.load(pages_ptr + tile * BLOCK // PAGE, eviction_policy=KEEP).to(tl.int64)
            k_row = page * stride_page + (j % PAGE) * stride_key
            v_row = page * stride_v_page + (j % PAGE) * stride_v_key
        else:
            page = tl.load(pages_ptr + j // PAGE, mask=j < length, other=0, eviction_policy=KEEP).to(tl.int64)
            k_row = page * stride_page + (j % PAGE) * stride_key
            v_row = page * stride_v_page + (j % PAGE) * stride_v_key
        k1 = tl.load(k_ptr + k_row[:, None] + pair[None, :], mask=seen, other=0.0)
        k2 = tl.load(k_ptr + k_row[:, None] + D // 2 + pair[None, :], mask=seen, other=0.0)
        v = tl.load(v_ptr + v_row[:, None] + channel[None, :], mask=seen, other=0.0)
        if (A and A_ROTATED) or (B and B_ROTATED):
            anchor = tl.minimum(tile * BLOCK + BLOCK, length) - 1
            behind = (tl.maximum(anchor - j, 0) * (D // 2))[:, None] + pair[None, :]
            cos = tl.load(cos_ptr + behind, eviction_policy=KEEP).to(tl.float32)
            sin = tl.load(sin_ptr + behind, eviction_policy=KEEP).to(tl.float32)
            r1 = (k1 * cos + k2 * sin).to(k1.dtype)
            r2 = (k2 * cos - k1 * sin).to(k1.dtype)
            ahead = (tl.zeros([1, 1], tl.int32) + length - N) - anchor
        if A:
            q1, q2 = queries_a
            if A_ROTATED:
                q1, q2 = _turned(q1, q2, ahead, turns, decay, WIDEN)
                state_a = _attend(state_a, q1, q2, r1, r2, v, j, rows_a, ONLINE, WIDEN)
            else:
                state_a = _attend(state_a, q1, q2, k1, k2, v, j, rows_a, ONLINE, WIDEN)
        if B:
            q1, q2 = queries_b
            if B_ROTATED:
                q1, q2 = _turned(q1, q2, ahead, turns, decay, WIDEN)
                state_b = _attend(state_b, q1, q2, r1, r2, v, j, rows_b, ONLINE, WIDEN)
            else:
                state_b = _attend(state_b, q1, q2, k1, k2, v, j, rows_b, ONLINE, WIDEN)
    return state_a, state_b


@triton.jit
def _load_set(
    q_ptr, strides, slopes_ptr, windows_ptr, first_head, heads, token0, length,
    tables, N: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    SLOPED: tl.constexpr, WINDOWED: tl.constexpr, ROTATED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Queries of a set of heads, row r being token r % TOKENS of head r // TOKENS, and what each row sees."""
    stride_token, stride_head = strides
    _, _, turns_ptr, decay_ptr = tables
    r = tl.arange(0, ROWS)
    head = first_head + r // TOKENS
    token = token0 + r % TOKENS
    real = (r < heads * TOKENS) & (token < N)
    pair = tl.arange(0, D // 2)
    at = q_ptr + (token * stride_token + head * stride_head)[:, None] + pair[None, :]
    q1 = tl.load(at, mask=real[:, None], other=0.0, eviction_policy=KEEP)
    q2 = tl.load(at + D // 2, mask=real[:, None], other=0.0, eviction_policy=KEEP)
    if ROTATED:
        q1 = q1.to(tl.float32)
        q2 = q2.to(tl.float32)
        if N > 1:  # the set turns as a whole afterwards: here each token, to where the first is
            q1, q2 = _turned(q1, q2, token[:, None], tl.load(turns_ptr + pair), tl.load(decay_ptr + pair), WIDEN)
    slope = tl.zeros([ROWS], tl.float32)
    if SLOPED:
        slope = tl.load(slopes_ptr + head, mask=real, other=0.0, eviction_policy=KEEP).to(tl.float32) * LOG2_E
    window = tl.where(real, NO_WINDOW, 0)
    if WINDOWED:
        window = tl.load(windows_ptr + head, mask=real, other=0, eviction_policy=KEEP)
        window = tl.minimum(window, NO_WINDOW).to(tl.int32)
    return (q1, q2), (length - N + token, slope, window), (head, token, real)


@triton.jit
def _state(top, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Of a set that has seen nothing yet."""
    return (
        tl.zeros([ROWS, D], tl.float32),
        tl.zeros([ROWS], tl.float32) + top,
        tl.zeros([ROWS, BLOCK], tl.float32),
    )


@triton.jit
def _all_bounded(bounds_ptr, GROUP: tl.constexpr, MEMBERS: tl.constexpr):
    """Whether all heads of a unit go without the running maximum (flash_forward.MAX_BOUND)."""
    member = tl.arange(0, MEMBERS)
    bounds = tl.load(bounds_ptr + member, mask=member < GROUP, other=0.0, eviction_policy=KEEP)
    return tl.max(bounds.to(tl.float32), axis=0) <= MAX_BOUND


@triton.jit
def _seen(
    t0, t1, tile_a, tile_b, queries_a, queries_b, rows_a, rows_b, pointers, strides, first, length, tables,
    N: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, ROWS_A: tl.constexpr,
    ROWS_B: tl.constexpr, A_ROTATED: tl.constexpr, B_ROTATED: tl.constexpr, ONLINE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The states of both sets after tiles t0..t1 - 1 of a unit, which set A sees from tile_a on, set B from tile_b."""
    top = float("-inf") if ONLINE else 0.0
    state_a = _state(top, ROWS_A if ROWS_A > 0 else 16, D, BLOCK)
    state_b = _state(top, ROWS_B if ROWS_B > 0 else 16, D, BLOCK)
    # A walk of no tile would still go through the motions of filling its pipeline, hence the second conditions.
    both = tl.maximum(t0, tl.maximum(tile_a, tile_b))
    a_from, a_to = tl.maximum(t0, tile_a), tl.minimum(t1, tile_b) if ROWS_B > 0 else t1
    b_from, b_to = tl.maximum(t0, tile_b), tl.minimum(t1, tile_a) if ROWS_A > 0 else t1
    if ROWS_A > 0:  # noqa: SIM102 - known when compiling, the other is not
        if a_from < a_to:
            state_a, state_b = _walk(
                state_a, state_b, a_from, a_to, queries_a, queries_b, rows_a, rows_b, pointers, strides, first, length,
                tables, N, D, PAGE, BLOCK, True, False, A_ROTATED, B_ROTATED, ONLINE, WIDEN,
            )  # fmt: skip
    if ROWS_B > 0:  # noqa: SIM102
        if b_from < b_to:
            state_a, state_b = _walk(
                state_a, state_b, b_from, b_to, queries_a, queries_b, rows_a, rows_b, pointers, strides, first, length,
                tables, N, D, PAGE, BLOCK, False, True, A_ROTATED, B_ROTATED, ONLINE, WIDEN,
            )  # fmt: skip
    if ROWS_A > 0 and ROWS_B > 0:  # noqa: SIM102
        if both < t1:
            state_a, state_b = _walk(
                state_a, state_b, both, t1, queries_a, queries_b, rows_a, rows_b, pointers, strides, first, length,
                tables, N, D, PAGE, BLOCK, True, True, A_ROTATED, B_ROTATED, ONLINE, WIDEN,
            )  # fmt: skip
    return state_a, state_b


@triton.jit
def _leave_empty(
    p, token0, total_ptr, N: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr
):
    """Slot p (N, GROUP) of a program without a share holds nothing, of this chunk's tokens."""
    member = tl.arange(0, MEMBERS)
    for token in range(token0, min(token0 + TOKENS, N)):
        tl.store(total_ptr + (p * N + token) * GROUP + member, 0.0, mask=member < GROUP)


@triton.jit
def _store_set(
    state, names, slot, head0, acc_ptr, top_ptr, total_ptr,
    N: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Into slot (N, GROUP); the accumulator of rows that saw nothing is left out."""
    acc, top, sums = state
    total = tl.sum(sums, axis=1)
    head, token, real = names
    row = slot * (N * GROUP) + token * GROUP + head - head0
    tl.store(top_ptr + row, top, mask=real)
    tl.store(total_ptr + row, total, mask=real)
    channel = tl.arange(0, D)
    tl.store(acc_ptr + row[:, None] * D + channel[None, :], acc, mask=(real & (total > 0))[:, None])


@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, pages_ptr, lengths_ptr, slopes_ptr, windows_ptr, bounds_ptr,
    cos_ptr, sin_ptr, turns_ptr, decay_ptr,
    acc_ptr, top_ptr, total_ptr, slots_ptr,
    stride_qb, stride_qn, stride_qh, stride_kp, stride_kn, stride_kh,
    stride_vp, stride_vn, stride_vh, stride_pages, units,
    N: tl.constexpr, TOKENS: tl.constexpr, CUT: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, ROWS_A: tl.constexpr, ROWS_B: tl.constexpr,
    A_ROTATED: tl.constexpr, B_ROTATED: tl.constexpr, SLOPED: tl.constexpr, WINDOWED: tl.constexpr,
    BOUNDED: tl.constexpr, FAR: tl.constexpr, NEAR: tl.constexpr, UNITS: tl.constexpr, MEMBERS: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid (programs, chunks of TOKENS new tokens). ROWS_A, ROWS_B: rows of a set, 0 where it has no head."""
    p = tl.program_id(0)
    token0 = tl.program_id(1) * TOKENS
    tables = (cos_ptr, sin_ptr, turns_ptr, decay_ptr)
    length_of, first_of, tile_a_of, tile_b_of, end_of = _units(
        lengths_ptr, windows_ptr, units, N, CUT, KV, GROUP, WINDOWED, BLOCK, FAR, NEAR, UNITS, MEMBERS
    )
    work = tl.max(end_of, axis=0)
    programs = tl.minimum(tl.num_programs(0), work)  # those that have a share
    part = work // tl.maximum(programs, 1)
    longer = work - part * programs  # so many programs, the first, have one more
    if UNITS == 1:  # every slot is the one unit's
        if p >= programs:
            _leave_empty(p, token0, total_ptr, N, TOKENS, GROUP, MEMBERS)
    elif (p == 0) & (token0 == 0):
        _store_slots(slots_ptr, length_of, tile_a_of, tile_b_of, end_of, part, longer, units, FAR, NEAR, BLOCK, UNITS)
    if p < programs:
        begin = p * part + tl.minimum(p, longer)
        end = begin + part + (p < longer).to(tl.int32)
        unit0 = 0 if UNITS == 1 else tl.sum((end_of <= begin).to(tl.int32), axis=0)
        for step in range(1 if UNITS == 1 else tl.sum((end_of < end).to(tl.int32), axis=0) + 1 - unit0):
            unit = unit0 + step
            length = _pick(length_of, unit)
            tile_a = _pick(tile_a_of, unit)
            tile_b = _pick(tile_b_of, unit)
            start = tl.max(tl.where(tl.arange(0, UNITS) < unit, end_of, 0), axis=0)
            t0 = _tile_at(tl.maximum(begin - start, 0), tile_a, tile_b, FAR, NEAR)
            t1 = _tile_at(tl.minimum(end, _pick(end_of, unit)) - start, tile_a, tile_b, FAR, NEAR)
            b = (unit // KV).to(tl.int64)
            kv = unit % KV
            head0 = kv * GROUP
            below = tl.minimum(tl.maximum(CUT - head0, 0), GROUP)
            # An absent set takes the least room that a product allows, and is left out by the compiler.
            queries_a, rows_a, names_a = _load_set(
                q_ptr + b * stride_qb, (stride_qn, stride_qh), slopes_ptr, windows_ptr, head0, below, token0, length,
                tables, N, TOKENS, D, ROWS_A if ROWS_A > 0 else 16, SLOPED, WINDOWED, A_ROTATED, WIDEN,
            )  # fmt: skip
            queries_b, rows_b, names_b = _load_set(
                q_ptr + b * stride_qb, (stride_qn, stride_qh), slopes_ptr, windows_ptr, head0 + below, GROUP - below,
                token0, length, tables, N, TOKENS, D, ROWS_B if ROWS_B > 0 else 16, SLOPED, WINDOWED, B_ROTATED, WIDEN,
            )  # fmt: skip
            pointers = (k_ptr + kv * stride_kh, v_ptr + kv * stride_vh, pages_ptr + b * stride_pages)
            strides = (stride_kp, stride_kn, stride_vp, stride_vn)
            first = _pick(first_of, unit)
            if BOUNDED and _all_bounded(bounds_ptr + head0, GROUP, MEMBERS):
                state_a, state_b = _seen(
                    t0, t1, tile_a, tile_b, queries_a, queries_b, rows_a, rows_b, pointers, strides, first, length,
                    tables, N, D, PAGE, BLOCK, ROWS_A, ROWS_B, A_ROTATED, B_ROTATED, False, WIDEN,
                )  # fmt: skip
            else:
                state_a, state_b = _seen(
                    t0, t1, tile_a, tile_b, queries_a, queries_b, rows_a, rows_b, pointers, strides, first, length,
                    tables, N, D, PAGE, BLOCK, ROWS_A, ROWS_B, A_ROTATED, B_ROTATED, True, WIDEN,
                )  # fmt: skip
            if ROWS_A > 0:
                _store_set(state_a, names_a, p + unit, head0, acc_ptr, top_ptr, total_ptr, N, GROUP, D)
            if ROWS_B > 0:
                _store_set(state_b, names_b, p + unit, head0, acc_ptr, top_ptr, total_ptr, N, GROUP, D)


@triton.jit
def _store_slots(
    slots_ptr, length, tile_a, tile_b, end, part, longer, units,
    FAR: tl.constexpr, NEAR: tl.constexpr, BLOCK: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """(units, 2): the first slot of each unit, and that after its last; the same where there is nothing to see."""
    unit = tl.arange(0, UNITS)
    hi = tl.maximum(tile_a, tile_b)
    cost = FAR * (hi - tl.minimum(tile_a, tile_b)) + NEAR * (tl.cdiv(length, BLOCK) - hi)
    lo_slot = _owner(end - cost, part, longer) + unit
    hi_slot = _owner(end - 1, part, longer) + unit + 1
    tl.store(slots_ptr + 2 * unit, lo_slot, mask=unit < units)
    tl.store(slots_ptr + 2 * unit + 1, tl.where(cost > 0, hi_slot, lo_slot), mask=unit < units)


@triton.jit
def _owner(cost, part, longer):
    """The program whose share holds this much of the work: the first `longer` have part + 1 each, the others part."""
    of_longer = longer * (part + 1)
    behind = longer + tl.maximum(cost - of_longer, 0) // tl.maximum(part, 1)
    return tl.where(cost < of_longer, tl.maximum(cost, 0) // (part + 1), behind)


@triton.jit
def merge_kernel(
    acc_ptr, top_ptr, total_ptr, slots_ptr, out_ptr,
    N: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    SLOTS: tl.constexpr, CHANNELS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Grid (B * N * heads, D // CHANNELS): out (B, N, heads, D), the sum over a unit's slots, divided by its mass.

    PROGRAMS: so many slots are all of a single unit's; 0: there are several units, and slots_ptr says whose is which.
    """
    row = tl.program_id(0)
    head = row % (KV * GROUP)
    token = row // (KV * GROUP) % N
    unit = row // (KV * GROUP * N) * KV + head // GROUP
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    acc = tl.zeros([CHANNELS], tl.float32)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    begin = 0 if PROGRAMS > 0 else tl.load(slots_ptr + 2 * unit)
    end = PROGRAMS if PROGRAMS > 0 else tl.load(slots_ptr + 2 * unit + 1)
    for s0 in range(begin, end, SLOTS):
        slot = s0 + tl.arange(0, SLOTS)
        at = slot.to(tl.int64) * (N * GROUP) + token * GROUP + head % GROUP
        tops = tl.load(top_ptr + at, mask=slot < end, other=float("-inf"))
        totals = tl.load(total_ptr + at, mask=slot < end, other=0.0)
        parts = tl.load(acc_ptr + at[:, None] * D + channel[None, :], mask=(slot < end)[:, None], other=0.0)
        parts = tl.where((totals > 0)[:, None], parts, 0.0)  # the others were never written,
        tops = tl.where(totals > 0, tops, float("-inf"))  # nor need these be
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(tops - base)
        scale = tl.exp2(top - base)
        acc = acc * scale + tl.sum(parts * weight[:, None], axis=0)
        total = total * scale + tl.sum(totals * weight, axis=0)
        top = new_top
    out = tl.where(total > 0, acc / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(out_ptr + row.to(tl.int64) * D + channel, out.to(out_ptr.dtype.element_ty))
