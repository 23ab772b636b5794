"""The Triton row kernels: statistics, loss and gradient of a row of logits, in one or two sweeps.

The first sweep walks a row in blocks of columns and keeps, online,

    m = max_j z_j        s = sum_j exp(z_j - m)        u = sum_j exp(z_j - m) (z_j - m)

so at the row's end lse, entropy, log-probability, importance ratio and the coefficients c1, c2, c3
of its loss are known, and a second sweep puts the gradient where the logits were:

    dx_j = (c1 (1[j=y] - p_j) + c2 p_j (log p_j + H) + c3 p_j) dz_j/dx_j.

One program holds one row at a time, so that its second sweep finds the row in the L2 cache. Row
offsets are int64 and no shape is a compile-time constant; hyper-parameters are float32 scalars.
Nothing is added atomically: the same inputs give the same bits, in any order of the programs.

The coefficients of a token-level loss are `policy_coefficient`, the derivative of
`objective.token_losses`, against which the tests hold it.
Legend: R rows of a chunk, V vocabulary, T tiles of MASS_TILE columns.
"""

# Triton's language has no type stubs.
# pyright: basic, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportOptionalOperand=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from exgrpo_kernels.objective import LOG_RATIO_LIMIT
from exgrpo_kernels.sparse_backward import COLUMNS

# Columns whose |gradient| is summed into one mass.
MASS_TILE = COLUMNS
# exp(-1000) is 0, and 0 * -1000 is 0 where 0 * -inf would be NaN.
LOWEST = tl.constexpr(-1000.0)
LIMIT = tl.constexpr(LOG_RATIO_LIMIT)
TILE = tl.constexpr(MASS_TILE)
MINUS_INFINITY = tl.constexpr(float("-inf"))


# ---- scalar functions that tl.math lacks or rounds away ------------------------------------------


@triton.jit
def tanh_and_slope(x):
    """tanh, by its series near 0, where 1 - exp(-2|x|) would cancel, and its derivative.

    That is 1 / cosh^2 x = exp(-2|x|) (1 + |tanh x|)^2; 1 - tanh^2 would cancel where tanh nears 1.
    """
    square = x * x
    tail = square * (17.0 / 315.0 - square * (62.0 / 2835.0 - square * (1382.0 / 155925.0)))
    series = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - tail)))
    exps = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - exps) / (1.0 + exps)
    tanh = tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0.0, -large, large))
    return tanh, exps * (1.0 + large) * (1.0 + large)


@triton.jit
def log_of_one_plus(x):
    """log(1 + x) for x >= 0, accurate where 1 + x rounds: the series of 2 atanh(x / (2 + x))."""
    t = x / (2.0 + x)
    square = t * t
    tail = square * (1.0 / 5.0 + square * (1.0 / 7.0 + square * (1.0 / 9.0)))
    series = 2.0 * t * (1.0 + square * (1.0 / 3.0 + tail))
    return tl.where(x < 0.5, series, tl.log(1.0 + x))


@triton.jit
def one_minus_exp(x):
    """1 - exp(x) for x <= 0, accurate near 0: the mass beside a nearly certain target."""
    tail = 1.0 + x * 0.2 * (1.0 + x * (1.0 / 6.0) * (1.0 + x * (1.0 / 7.0)))
    series = -x * (1.0 + x * 0.5 * (1.0 + x * (1.0 / 3.0) * (1.0 + x * 0.25 * tail)))
    return tl.where(x > -0.3, series, 1.0 - tl.exp(x))


# ---- a block of logits ---------------------------------------------------------------------------


@triton.jit
def load_scaled(row, bias, columns, num_columns, softcap, inverse_temperature):
    """z = softcap(x + bias) / temperature and dz/dx of some columns; beyond the row z is -inf."""
    inside = columns < num_columns
    x = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
    slope = inverse_temperature
    if bias is not None:
        x += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if softcap is not None:
        tanh, derivative = tanh_and_slope(x / softcap)
        x = softcap * tanh
        slope = inverse_temperature * derivative
    return tl.where(inside, x * inverse_temperature, MINUS_INFINITY), slope


@triton.jit
def shifted(z, shift):
    """z - shift, with a finite stand-in for -inf; NaN stays NaN."""
    return tl.where(z == MINUS_INFINITY, LOWEST, z - shift)


# ---- first sweep ---------------------------------------------------------------------------------


@triton.jit
def row_statistics(
    row, bias, target, num_columns, softcap, inverse_temperature, BLOCK: tl.constexpr
):
    """-> log p(target), entropy, shift m, log sum exp(z - m).

    The target is added to the sums last: the log-probability of a nearly certain token is minus
    the sum of the others, which 1 + sum would round away.
    """
    top = MINUS_INFINITY
    others = tl.zeros([BLOCK], tl.float32)
    moments = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z, _ = load_scaled(row, bias, columns, num_columns, softcap, inverse_temperature)
        new_top = tl.maximum(top, tl.max(z, 0))
        # before the first finite logit there is nothing to rescale, and -inf - -inf is NaN
        drop = tl.where(top == MINUS_INFINITY, 0.0, top - new_top)
        rescale = tl.exp(drop)
        distance = shifted(z, new_top)
        exps = tl.where(columns == target, 0.0, tl.exp(distance))
        moments = (moments + others * drop) * rescale + exps * distance
        others = others * rescale + exps
        top = new_top
    rest = tl.sum(others, 0)
    target_z, _ = load_scaled(row, bias, target, num_columns, softcap, inverse_temperature)
    target_distance = shifted(target_z, top)
    target_exp = tl.exp(target_distance)
    total = rest + target_exp
    log_total = tl.log(total)
    entropy = log_total - (tl.sum(moments, 0) + target_exp * target_distance) / total
    # the exact distance: a target on a -inf column has the log-probability -inf
    logprob = target_z - top - log_total
    odds_against = rest / target_exp
    logprob = tl.where(odds_against < 0.5, -log_of_one_plus(odds_against), logprob)
    return logprob, entropy, top, log_total


# ---- the loss of a row ---------------------------------------------------------------------------


@triton.jit
def policy_coefficient(
    logprob,
    weight,
    advantage,
    behaviour_logprob,
    shaping,
    ref_logprob,
    kl_weight,
    ratio_low,
    ratio_high,
    dual_clip,
    tv_low,
    tv_high,
    sapo_temperature_positive,
    sapo_temperature_negative,
    kl_coef,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
):
    """c1 = dL / d logprob of one token; the formulas are the derivatives of `token_losses`.

    A token of weight 0 gives exactly 0, whatever its columns hold; NaN anywhere else gives NaN.
    `shaping`, `ref_logprob` and `kl_weight` are None where the batch has none.
    """
    log_ratio = logprob - behaviour_logprob
    in_range = tl.abs(log_ratio) <= LIMIT
    ratio = tl.exp(tl.minimum(tl.maximum(log_ratio, -LIMIT), LIMIT))
    reached = tl.where(in_range, ratio, 0.0)
    if SURROGATE == "clip":
        below_top = tl.where(advantage > 0.0, ratio <= ratio_high, ratio <= dual_clip)
        active = below_top & ((advantage > 0.0) | (ratio >= ratio_low))
        slope = tl.where(active, reached, 0.0)
    elif SURROGATE == "cispo":
        slope = tl.minimum(ratio, ratio_high)
    elif SURROGATE == "sapo":
        sharpness = tl.where(advantage > 0.0, sapo_temperature_positive, sapo_temperature_negative)
        # the sigmoid from the side on which exp cannot overflow
        decay = tl.exp(-tl.abs(sharpness * (ratio - 1.0)))
        slope = 4.0 * decay / ((1.0 + decay) * (1.0 + decay)) * reached
    else:
        slope = 1.0
    moved = tl.exp(logprob) - tl.exp(behaviour_logprob)
    slope = tl.where(tl.where(advantage > 0.0, moved > tv_high, moved < -tv_low), 0.0, slope)
    if shaping is not None:
        distance = log_ratio - tl.log(tl.where(shaping > 0.0, shaping, 1.0))
        decay = tl.exp(-tl.abs(distance))
        shaped = decay / ((1.0 + decay) * (1.0 + decay))
        slope = tl.where(shaping > 0.0, shaped, slope)
    # advantage 0 is silent, also where the slope is not a number
    c1 = tl.where(advantage == 0.0, 0.0, -advantage * slope)
    poison = (logprob != logprob) | (advantage != advantage)
    poison = poison | ((behaviour_logprob != behaviour_logprob) & (advantage != 0.0))
    if KL != "none":
        gap = logprob - ref_logprob
        if KL == "k1":
            kl_slope = 1.0
        elif KL == "k2":
            kl_slope = gap
        elif KL == "abs":
            kl_slope = tl.where(gap > 0.0, 1.0, tl.where(gap < 0.0, -1.0, 0.0))
        else:
            bounded = tl.minimum(tl.maximum(gap, -LIMIT), LIMIT)
            decay = tl.exp(-bounded)
            kl_slope = tl.where(tl.abs(gap) <= LIMIT, 1.0 - decay, 0.0)
            if KL == "k3_ratio":
                # the slope of k3 and k3 itself add up to the gap, without cancellation
                both = tl.where(tl.abs(gap) <= LIMIT, gap, decay - 1.0 + bounded)
                kl_slope = ratio * tl.where(in_range, both, kl_slope)
        if kl_weight is not None:
            kl_slope *= kl_weight
        c1 += kl_coef * kl_slope
        poison = poison | (ref_logprob != ref_logprob)
    c1 = tl.where(poison, float("nan"), weight * c1)
    return tl.where(weight == 0.0, 0.0, c1)


# ---- second sweep --------------------------------------------------------------------------------


@triton.jit
def store_row_gradient(
    row,
    out,
    bias,
    masses,
    sums,
    target,
    num_columns,
    softcap,
    inverse_temperature,
    logprob,
    entropy,
    shift,
    log_total,
    c1,
    c2,
    c3,
    NARROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx of one row into `out`, which may be `row`; |dx| summed over tiles into `masses`."""
    # p_y - 1 would cancel where the target is nearly certain
    certain = tl.exp(logprob) * (c2 * (tl.maximum(logprob, LOWEST) + entropy) + c3)
    at_target = c1 * one_minus_exp(logprob) + certain
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z, slope = load_scaled(row, bias, columns, num_columns, softcap, inverse_temperature)
        if NARROWS:
            # a narrow row begins where its wide one does: everyone reads before anyone writes
            tl.debug_barrier()
        log_p = shifted(z, shift) - log_total
        dz = tl.exp(log_p) * (c2 * (log_p + entropy) + (c3 - c1))
        dx = tl.where(columns == target, at_target, dz) * slope
        tl.store(out + columns, dx.to(out.dtype.element_ty), mask=columns < num_columns)
        if masses is not None:
            mass = tl.sum(tl.reshape(tl.abs(dx), [BLOCK // TILE, TILE]), 1)
            tiles = start // TILE + tl.arange(0, BLOCK // TILE)
            tl.store(masses + tiles, mass, mask=tiles * TILE < num_columns)
            if sums is not None:
                signed = tl.sum(
                    tl.reshape(tl.where(columns < num_columns, dx, 0.0), [BLOCK // TILE, TILE]), 1
                )
                tl.store(sums + tiles, signed, mask=tiles * TILE < num_columns)


@triton.jit
def store_zeros(out, masses, sums, num_columns, BLOCK: tl.constexpr):
    """A dead row: nothing is read."""
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        zeros = tl.zeros([BLOCK], out.dtype.element_ty)
        tl.store(out + columns, zeros, mask=columns < num_columns)
        if masses is not None:
            tiles = start // TILE + tl.arange(0, BLOCK // TILE)
            zeros = tl.zeros([BLOCK // TILE], tl.float32)
            tl.store(masses + tiles, zeros, mask=tiles * TILE < num_columns)
            if sums is not None:
                tl.store(sums + tiles, zeros, mask=tiles * TILE < num_columns)


# ---- kernels: a program walks over rows ----------------------------------------------------------
# Lengths change from step to step, and slices of a vector start at any element: specialising on
# either would compile each kernel several times in the first steps. ROWS is the number of rows of a
# chunk and of its GEMMs, VECTORS are read one element at a time.
ROWS = ("num_rows", "num_padded")
VECTORS = (
    *("targets", "temperatures", "logprobs", "entropies", "lses", "c1s", "c2s", "c3s"),
    *("weights", "advantages", "behaviour_logprobs", "shapings", "ref_logprobs", "kl_weights"),
)
walks_rows = triton.jit(do_not_specialize=ROWS, do_not_specialize_on_alignment=VECTORS)


@triton.jit
def row_inverse_temperature(temperatures, r, inverse_temperature):
    if temperatures is not None:
        inverse_temperature = 1.0 / tl.load(temperatures + r)
    return inverse_temperature


@walks_rows
def statistics_kernel(
    logits,
    logits_stride,
    bias,
    targets,
    temperatures,
    inverse_temperature,
    softcap,
    logprobs,
    entropies,
    lses,
    num_rows,
    num_columns,
    BLOCK: tl.constexpr,
):
    for index in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        r = tl.cast(index, tl.int64)
        row_temperature = row_inverse_temperature(temperatures, r, inverse_temperature)
        target = tl.load(targets + r).to(tl.int32)
        row = logits + r * logits_stride
        logprob, entropy, top, log_total = row_statistics(
            row, bias, target, num_columns, softcap, row_temperature, BLOCK
        )
        tl.store(logprobs + r, logprob)
        tl.store(entropies + r, entropy)
        tl.store(lses + r, top + log_total)


@walks_rows
def gradient_kernel(
    logits,
    logits_stride,
    out,
    out_stride,
    masses,
    sums,
    masses_stride,
    bias,
    targets,
    temperatures,
    inverse_temperature,
    softcap,
    logprobs,
    entropies,
    lses,
    c1s,
    c2s,
    c3s,
    num_rows,
    num_padded,
    num_columns,
    NARROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for index in range(tl.program_id(0), num_padded, tl.num_programs(0)):
        r = tl.cast(index, tl.int64)
        real = r < num_rows
        c1 = tl.load(c1s + r, mask=real, other=0.0)
        c2 = tl.zeros_like(c1)
        c3 = tl.zeros_like(c1)
        if c2s is not None:
            c2 = tl.load(c2s + r, mask=real, other=0.0)
        if c3s is not None:
            c3 = tl.load(c3s + r, mask=real, other=0.0)
        row_masses = masses
        if masses is not None:
            row_masses = masses + r * masses_stride
        row_sums = sums
        if sums is not None:
            row_sums = sums + r * masses_stride
        if (c1 != 0.0) | (c2 != 0.0) | (c3 != 0.0):
            store_row_gradient(
                logits + r * logits_stride,
                out + r * out_stride,
                bias,
                row_masses,
                row_sums,
                tl.load(targets + r).to(tl.int32),
                num_columns,
                softcap,
                row_inverse_temperature(temperatures, r, inverse_temperature),
                tl.load(logprobs + r),
                tl.load(entropies + r),
                tl.load(lses + r),
                0.0,
                c1,
                c2,
                c3,
                NARROWS,
                BLOCK,
            )
        else:
            store_zeros(out + r * out_stride, row_masses, row_sums, num_columns, BLOCK)


@walks_rows
def policy_gradient_kernel(
    logits,
    logits_stride,
    out,
    out_stride,
    masses,
    sums,
    masses_stride,
    bias,
    targets,
    temperatures,
    inverse_temperature,
    softcap,
    weights,
    advantages,
    behaviour_logprobs,
    shapings,
    ref_logprobs,
    kl_weights,
    ratio_low,
    ratio_high,
    dual_clip,
    tv_low,
    tv_high,
    sapo_temperature_positive,
    sapo_temperature_negative,
    kl_coef,
    entropy_coef,
    logprobs,
    entropies,
    lses,
    c1s,
    num_rows,
    num_padded,
    num_columns,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    NARROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for index in range(tl.program_id(0), num_padded, tl.num_programs(0)):
        r = tl.cast(index, tl.int64)
        row_masses = masses
        if masses is not None:
            row_masses = masses + r * masses_stride
        row_sums = sums
        if sums is not None:
            row_sums = sums + r * masses_stride
        alive = False
        if r < num_rows:
            target = tl.load(targets + r).to(tl.int32)
            row_temperature = row_inverse_temperature(temperatures, r, inverse_temperature)
            row = logits + r * logits_stride
            logprob, entropy, top, log_total = row_statistics(
                row, bias, target, num_columns, softcap, row_temperature, BLOCK
            )
            tl.store(logprobs + r, logprob)
            tl.store(entropies + r, entropy)
            tl.store(lses + r, top + log_total)
            weight = tl.load(weights + r)
            shaping = shapings
            if shapings is not None:
                shaping = tl.load(shapings + r)
            ref_logprob = ref_logprobs
            if ref_logprobs is not None:
                ref_logprob = tl.load(ref_logprobs + r)
            kl_weight = kl_weights
            if kl_weights is not None:
                kl_weight = tl.load(kl_weights + r)
            c1 = policy_coefficient(
                logprob,
                weight,
                tl.load(advantages + r),
                tl.load(behaviour_logprobs + r),
                shaping,
                ref_logprob,
                kl_weight,
                ratio_low,
                ratio_high,
                dual_clip,
                tv_low,
                tv_high,
                sapo_temperature_positive,
                sapo_temperature_negative,
                kl_coef,
                SURROGATE,
                KL,
            )
            c2 = entropy_coef * weight
            alive = (c1 != 0.0) | (c2 != 0.0)
            tl.store(c1s + r, c1)
            if alive:
                store_row_gradient(
                    row,
                    out + r * out_stride,
                    bias,
                    row_masses,
                    row_sums,
                    target,
                    num_columns,
                    softcap,
                    row_temperature,
                    logprob,
                    entropy,
                    top,
                    log_total,
                    c1,
                    c2,
                    tl.zeros_like(c2),
                    NARROWS,
                    BLOCK,
                )
        if not alive:
            store_zeros(out + r * out_stride, row_masses, row_sums, num_columns, BLOCK)
