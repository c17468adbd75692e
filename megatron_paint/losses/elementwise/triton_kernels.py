"""Triton kernels for the elementwise passes: one program per row, which processes the vocabulary block by block.

Every lane keeps separate running values, which are merged once at the end of the row: the loop has no reduction, and
each sum is added up in as many parts as a block has lanes. Logits are loaded before the temperature, in any floating
point type, and become float32. -inf counts as -1e30: its exponential is 0, and its differences stay finite. NaN stays
NaN: Triton's minimum and maximum would drop it, and a broken model would seem to learn.
The formulas are those of divergences.py. Axes: T tokens (rows), V this rank's vocabulary columns.
"""

import triton
import triton.language as tl

_LOWEST = tl.constexpr(-1e30)
_E = tl.constexpr(2.718281828459045)
_NEAR = tl.constexpr(0.5)


@triton.jit
def _load(row_ptr, columns, inside, factor):
    """Logits divided by the temperature, of which factor is the inverse; -1e30 outside."""
    values = tl.load(row_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32) * factor
    return tl.where(values < _LOWEST, _LOWEST, values)


@triton.jit
def _load_all(student_ptr, teacher_ptr, partner_ptr, row_start, columns, inside, factor, FULL_TEACHER: tl.constexpr):
    """Logits divided by the temperature; the partner is the student unless there is a full teacher."""
    student = _load(student_ptr + row_start, columns, inside, factor)
    teacher = _load(teacher_ptr + row_start, columns, inside, factor)
    partner = student
    if FULL_TEACHER:
        partner = _load(partner_ptr + row_start, columns, inside, factor)
    return student, teacher, partner


@triton.jit
def _allowed(deciding_ptr, row_start, columns, inside, factor, floor, SUPPORT: tl.constexpr):
    """The columns inside that belong to the support: all without one."""
    allowed = inside
    if SUPPORT:
        allowed = (_load(deciding_ptr + row_start, columns, inside, factor) >= floor) & inside
    return allowed


@triton.jit
def _lerp(start, end, weight):
    """As torch.lerp: exact at both ends."""
    return tl.where(weight < 0.5, start + weight * (end - start), end - (end - start) * (1.0 - weight))


@triton.jit
def _expm1_less(u):
    """expm1(u) - u, accurate near 0: a series there, the plain difference elsewhere."""
    v = tl.minimum(tl.maximum(u, -_NEAR), _NEAR)
    series = 1.0 + v * (1.0 / 9.0) * (1.0 + v * (1.0 / 10.0))
    series = 1.0 + v * (1.0 / 7.0) * (1.0 + v * (1.0 / 8.0) * series)
    series = 1.0 + v * (1.0 / 5.0) * (1.0 + v * (1.0 / 6.0) * series)
    series = 1.0 + v * (1.0 / 3.0) * (1.0 + v * (1.0 / 4.0) * series)
    return tl.where(u == v, 0.5 * v * v * series, tl.exp(u) - 1.0 - u)


@triton.jit
def _log1p(w):
    """log(1 + w) for w above -1, accurate near 0."""
    t = w / (2.0 + w)
    s = t * t
    series = 1.0 / 9.0 + s * (1.0 / 11.0 + s * (1.0 / 13.0 + s * (1.0 / 15.0)))
    series = 1.0 + s * (1.0 / 3.0 + s * (1.0 / 5.0 + s * (1.0 / 7.0 + s * series)))
    return tl.where(tl.abs(w) < _NEAR, 2.0 * t * series, tl.log(1.0 + w))


@triton.jit
def _terms(x, y, u):
    """x (expm1(u) - u), u = log y - log x; y - x (1 + u) where expm1 could overflow."""
    return tl.where(u > 1.0, y - x * (1.0 + u), x * _expm1_less(tl.where(u > 1.0, 1.0, u)))


@triton.jit
def _mixture(p, q, u, beta, alpha):
    """m = beta q + alpha p, log m - log p and log m - log q, each computed separately: see divergences.py."""
    v = tl.abs(u)
    near = tl.where(v > 80.0, 80.0, v)
    expm1_of_fall = _expm1_less(-near) - near
    fall = _log1p(expm1_of_fall * tl.where(u > 0.0, beta, alpha))
    rise = _log1p(-expm1_of_fall * tl.exp(near) * tl.where(u > 0.0, alpha, beta)) + (v - near)
    return beta * q + alpha * p, tl.where(u > 0.0, fall, rise), tl.where(u > 0.0, rise, fall)


@triton.jit
def _extended(maximum, total, weighted, values, inside):
    """A lane's softmax with one more value: maximum m, sum of exp(z - m), sum of exp(z - m) (z - m)."""
    d = values - maximum
    up = (d > 0.0) & inside
    e = tl.where(inside, tl.exp(-tl.abs(d)), 0.0)
    weighted = tl.where(up, e * (weighted - d * total), weighted + e * d)
    total = tl.where(up, total * e + 1.0, total + e)
    return tl.where(up, values, maximum), total, weighted


@triton.jit
def _merged(maximum, total, weighted):
    """One softmax from those of all lanes."""
    top = tl.max(maximum, axis=0)
    shift = maximum - top
    factor = tl.exp(shift)
    return top, tl.sum(total * factor, axis=0), tl.sum(factor * (weighted + shift * total), axis=0)


@triton.jit
def statistics_kernel(
    student_ptr,
    teacher_ptr,
    partner_ptr,
    deciding_ptr,
    floor_ptr,
    packed_ptr,
    row_stride,
    columns,
    factor,
    weight,
    ratio,
    MIXED: tl.constexpr,
    FULL_TEACHER: tl.constexpr,
    SUPPORT: tl.constexpr,
    HEATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[T, 14] from one read of the logits: (maximum, sum, weighted sum) of student and teacher, (maximum, sum) of the
    interpolation over the support, the sum of exp(ratio (z - maximum)) of the student (HEATED, else 0), and with
    SUPPORT (maximum, sum) of the teacher over the support, its size, and (maximum, sum) of the complete interpolation.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], dtype=tl.float32)
    s_max, t_max, q_max = zero + _LOWEST, zero + _LOWEST, zero + _LOWEST
    s_sum, t_sum, q_sum, s_weighted, t_weighted, q_weighted, heated = zero, zero, zero, zero, zero, zero, zero
    c_max, c_sum, c_weighted, size = zero + _LOWEST, zero, zero, zero
    u_max, u_sum, u_weighted = zero + _LOWEST, zero, zero
    floor = tl.load(floor_ptr + row)
    for start in range(0, columns, BLOCK):
        place = start + lanes
        inside = place < columns
        student, teacher, partner = _load_all(
            student_ptr, teacher_ptr, partner_ptr, row * row_stride, place, inside, factor, FULL_TEACHER
        )
        if HEATED:
            d = student - s_max
            e = tl.where(inside, tl.exp(-tl.abs(d) * ratio), 0.0)
            heated = tl.where((d > 0.0) & inside, heated * e + 1.0, heated + e)
        s_max, s_sum, s_weighted = _extended(s_max, s_sum, s_weighted, student, inside)
        t_max, t_sum, t_weighted = _extended(t_max, t_sum, t_weighted, teacher, inside)
        allowed = _allowed(deciding_ptr, row * row_stride, place, inside, factor, floor, SUPPORT)
        if SUPPORT:
            c_max, c_sum, c_weighted = _extended(c_max, c_sum, c_weighted, teacher, allowed)
            size += tl.where(allowed, 1.0, 0.0)
        if MIXED:
            mixed = _lerp(teacher, partner, weight)
            q_max, q_sum, q_weighted = _extended(q_max, q_sum, q_weighted, mixed, allowed)
            if SUPPORT:
                u_max, u_sum, u_weighted = _extended(u_max, u_sum, u_weighted, mixed, inside)
    heated = tl.sum(heated * tl.exp((s_max - tl.max(s_max, axis=0)) * ratio), axis=0)
    s_max, s_sum, s_weighted = _merged(s_max, s_sum, s_weighted)
    t_max, t_sum, t_weighted = _merged(t_max, t_sum, t_weighted)
    q_max, q_sum, q_weighted = _merged(q_max, q_sum, q_weighted)
    c_max, c_sum, c_weighted = _merged(c_max, c_sum, c_weighted)
    u_max, u_sum, u_weighted = _merged(u_max, u_sum, u_weighted)
    out = packed_ptr + row * 14
    tl.store(out, s_max)
    tl.store(out + 1, s_sum)
    tl.store(out + 2, s_weighted)
    tl.store(out + 3, t_max)
    tl.store(out + 4, t_sum)
    tl.store(out + 5, t_weighted)
    tl.store(out + 6, q_max)
    tl.store(out + 7, q_sum)
    tl.store(out + 8, heated)
    tl.store(out + 9, c_max)
    tl.store(out + 10, c_sum)
    tl.store(out + 11, tl.sum(size, axis=0))
    tl.store(out + 12, u_max)
    tl.store(out + 13, u_sum)


@triton.jit
def token_statistics_kernel(logits_ptr, packed_ptr, row_stride, columns, BLOCK: tl.constexpr):
    """[T, 3] from one read of the logits: maximum, sum, weighted sum."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], dtype=tl.float32)
    maximum, total, weighted = zero + _LOWEST, zero, zero
    for start in range(0, columns, BLOCK):
        place = start + lanes
        inside = place < columns
        values = _load(logits_ptr + row * row_stride, place, inside, 1.0)
        maximum, total, weighted = _extended(maximum, total, weighted, values, inside)
    maximum, total, weighted = _merged(maximum, total, weighted)
    out = packed_ptr + row * 3
    tl.store(out, maximum)
    tl.store(out + 1, total)
    tl.store(out + 2, weighted)


@triton.jit
def token_gradient_kernel(
    logits_ptr, token_ptr, given_ptr, dlogits_ptr, row_stride, dlogits_stride, columns, BLOCK: tl.constexpr
):
    """scale ([v is the token] - p) from one read of the logits and one write; both may use the same buffer.

    token [T]: its column, -1 if another rank has it; given [T, 3]: maximum and log-sum of the softmax, scale.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    given = given_ptr + row * 3
    maximum, logarithm, scale = tl.load(given), tl.load(given + 1), tl.load(given + 2)
    token = tl.load(token_ptr + row)
    for start in range(0, columns, BLOCK):
        place = start + lanes
        inside = place < columns
        p = tl.exp((_load(logits_ptr + row * row_stride, place, inside, 1.0) - maximum) - logarithm)
        change = scale * (tl.where(place == token, 1.0, 0.0) - p)
        tl.store(dlogits_ptr + row * dlogits_stride + place, change.to(dlogits_ptr.dtype.element_ty), mask=inside)


@triton.jit
def divergence_kernel(
    student_ptr,
    teacher_ptr,
    partner_ptr,
    deciding_ptr,
    normalisers_ptr,
    sums_ptr,
    dlogits_ptr,
    row_stride,
    dlogits_stride,
    columns,
    factor,
    clip,
    beta,
    alpha,
    DIVERGENCE: tl.constexpr,
    CLIPPED: tl.constexpr,
    MIXED: tl.constexpr,
    FULL_TEACHER: tl.constexpr,
    SUPPORT: tl.constexpr,
    SUMS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One read of the logits for the divergence's sums [T, 5] (SUMS), its gradient (GRADIENT: one write), or both.

    normalisers [T, 8]: student's maximum and log-sum, the target's, lambda, the gradient's coefficient c and its scale,
    the smallest energy in the support.
    alpha: 1 - beta of the JSD, computed in float64 because float32 would round it. dlogits may be the teacher's buffer.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    given = normalisers_ptr + row * 8
    p_max, p_log, q_max, q_log = tl.load(given), tl.load(given + 1), tl.load(given + 2), tl.load(given + 3)
    weight, coefficient, scale, floor = (
        tl.load(given + 4),
        tl.load(given + 5),
        tl.load(given + 6),
        tl.load(given + 7),
    )
    zero = tl.zeros([BLOCK], dtype=tl.float32)
    first, second, third, fourth, fifth = zero, zero, zero, zero, zero
    for start in range(0, columns, BLOCK):
        place = start + lanes
        inside = place < columns
        student, target, partner = _load_all(
            student_ptr, teacher_ptr, partner_ptr, row * row_stride, place, inside, factor, FULL_TEACHER
        )
        if MIXED:
            target = tl.where(weight == 0.0, target, _lerp(target, partner, weight))
        log_p = (student - p_max) - p_log
        log_q = (target - q_max) - q_log
        if SUPPORT:
            allowed = _allowed(deciding_ptr, row * row_stride, place, inside, factor, floor, SUPPORT)
            log_q = tl.where(allowed, log_q, _LOWEST)
        p, q, u = tl.exp(log_p), tl.exp(log_q), log_p - log_q
        if DIVERGENCE == "forward_kl":
            b = q
            if SUMS:
                terms = _terms(q, p, u)
                first += tl.where(inside, terms, 0.0)
            if CLIPPED:
                clipped = (u * q < -clip) & inside
                b = tl.where(clipped, 0.0, q)
                if SUMS:
                    second += tl.where(inside, tl.where(clipped, clip + p - q, terms), 0.0)
                    third += tl.where(inside, b, 0.0)
                    fourth += tl.where(clipped, q, 0.0)
                    fifth += tl.where(clipped, 1.0, 0.0)
        elif DIVERGENCE == "reverse_kl":
            b = -p * u
            if SUMS:
                first += tl.where(inside, _terms(p, q, -u), 0.0)
        else:
            tl.static_assert(DIVERGENCE == "jsd", "the kernel has no arithmetic for this divergence")
            m, u_p, u_q = _mixture(p, q, u, beta, alpha)
            b = p * u_p * alpha
            if SUMS:
                student_term = _terms(p, m, u_p)
                target_term = _terms(q, m, u_q)
                first += tl.where(inside, beta * target_term + alpha * student_term, 0.0)
                second += tl.where(inside, student_term, 0.0)
        if GRADIENT:
            change = (scale * (coefficient * p - b)).to(dlogits_ptr.dtype.element_ty)
            tl.store(dlogits_ptr + row * dlogits_stride + place, change, mask=inside)
    if SUMS:
        out = sums_ptr + row * 5
        tl.store(out, tl.sum(first, axis=0))
        tl.store(out + 1, tl.sum(second, axis=0))
        tl.store(out + 2, tl.sum(third, axis=0))
        tl.store(out + 3, tl.sum(fourth, axis=0))
        tl.store(out + 4, tl.sum(fifth, axis=0))
