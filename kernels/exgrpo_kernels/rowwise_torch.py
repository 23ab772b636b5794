"""The rows of one chunk of logits in plain PyTorch: for CPUs, and for float64.

Every pass works in place or in blocks of a few rows, so little memory is needed beside the chunk.
`exp` of a logit is left unnormalised; its divisor is applied to the small operand of the GEMMs.

Legend: R rows of a chunk, L live ones among them, B rows of a block, V vocabulary, D hidden.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from exgrpo_kernels import runtime
from exgrpo_kernels.linear_head import LinearLogprob, LogitGradient, RowCoefficients, RowInputs
from exgrpo_kernels.objective import LossColumns, PolicyObjective, row_scalars
from exgrpo_kernels.sparse_backward import TileMasses, mean_coefficient, num_tiles, tile_sums

# exp(-1000) is 0 in float64 too, so replacing -inf by it changes no probability, and 0 * -1000
# is 0 where 0 * -inf would be NaN.
LOWEST_SHIFTED_LOGIT = -1000.0


class TorchRows:
    """`ChunkRows` in plain PyTorch; between its steps the buffer holds z - shift.

    With a softcap it holds x until the gradient: near the cap the slope is lost in z.
    """

    def __init__(
        self,
        logits: Tensor,
        *,
        has_softcap: bool,
        operand_dtype: torch.dtype,
        closes_gaps: bool = True,
        keeps_masses: bool = False,
        keeps_sums: bool = False,
    ):
        """`logits` (R, V) is the buffer to use; the GEMMs get operands of `operand_dtype`.

        With `closes_gaps`, rows without a gradient are left out of the GEMMs where the host can
        read the coefficients; else they become exact zeros.
        """
        self.logits, self.operand_dtype = logits, operand_dtype
        self.keeps_masses, self.keeps_sums = keeps_masses, keeps_sums
        self.closes_gaps = closes_gaps and runtime.can_read_values(logits.device)
        row_bytes = logits.shape[1] * logits.element_size()
        block = runtime.block_rows(len(logits), row_bytes)
        self.block = logits.new_empty(block, logits.shape[1])
        self.slope = torch.empty_like(self.block) if has_softcap else None
        self.shift = self.total = logits.new_empty(0)

    def blocks(self, num_rows: int) -> Iterator[slice]:
        step = len(self.block)
        for start in range(0, num_rows, step):
            yield slice(start, min(start + step, num_rows))

    def padded(self, num_rows: int) -> int:
        return num_rows

    # ---- forward ---------------------------------------------------------------------------------

    def statistics(self, inputs: RowInputs, *, leaves_exps: bool = False) -> LinearLogprob:
        """Of the whole chunk, in place."""
        return self.statistics_(self.logits[: len(inputs)], inputs, leaves_exps=leaves_exps)

    def statistics_beside(self, inputs: RowInputs) -> LinearLogprob:
        """The same on copies of a few rows at a time: the buffer keeps x."""
        assert self.slope is not None
        # an operator returns them: no two may share memory
        found = [self.logits.new_empty(len(inputs)) for _ in range(5)]
        for rows in self.blocks(len(inputs)):
            x = self.slope[: rows.stop - rows.start].copy_(self.logits[rows])
            part = *self.statistics_(x, inputs.rows(rows)), self.shift, self.total
            for whole, values in zip(found, part, strict=True):
                whole[rows] = values
        *statistics, self.shift, self.total = found
        return LinearLogprob(*statistics)

    def statistics_(
        self, x_RV: Tensor, inputs: RowInputs, *, leaves_exps: bool = False
    ) -> LinearLogprob:
        """What needs no scratch runs over all rows at once: fewer waits for the slowest core.

        With `leaves_exps` exp(z - shift) is left behind: a copy costs less than a second exp.
        """
        z_RV = scale_(x_RV, inputs)
        shift = torch.amax(z_RV, -1)
        z_RV.sub_(shift[:, None])
        target = z_RV.gather(1, inputs.targets_N[:, None]).squeeze(1)
        if inputs.may_hold_infinity:
            z_RV.clamp_(min=LOWEST_SHIFTED_LOGIT)
        total, moment = torch.empty_like(shift), torch.empty_like(shift)
        for rows in self.blocks(len(z_RV)):
            z = z_RV[rows]
            exps = torch.exp(z, out=self.block[: len(z)])
            torch.sum(exps, -1, out=total[rows])
            if leaves_exps:
                torch.sum(z.mul_(exps), -1, out=moment[rows])
                z.copy_(exps)
            else:
                torch.sum(exps.mul_(z), -1, out=moment[rows])
        log_total = total.log()
        self.shift, self.total = shift, total
        return LinearLogprob(target - log_total, log_total - moment / total, shift + log_total)

    # ---- gradient --------------------------------------------------------------------------------

    def policy_gradient(
        self, inputs: RowInputs, objective: PolicyObjective, columns: LossColumns
    ) -> tuple[LinearLogprob, LogitGradient]:
        only_c1 = objective.entropy_coef == 0 and inputs.softcap is None
        if inputs.softcap is None:
            statistics = self.statistics(inputs, leaves_exps=only_c1)
        else:
            statistics = self.statistics_beside(inputs)
        scalars = row_scalars(objective, statistics.logprobs, statistics.entropy, columns)
        coefficients = RowCoefficients(*scalars)
        return statistics, self.live_gradient(inputs, statistics, coefficients, has_exps=only_c1)

    def gradient(
        self, inputs: RowInputs, statistics: LinearLogprob, coefficients: RowCoefficients
    ) -> LogitGradient:
        if inputs.softcap is None:
            z_RV = scale_(self.logits[: len(inputs)], inputs).sub_(statistics.lse[:, None])
            if inputs.may_hold_infinity:
                z_RV.clamp_(min=LOWEST_SHIFTED_LOGIT)
        self.shift, self.total = statistics.lse, torch.ones_like(statistics.lse)
        return self.live_gradient(inputs, statistics, coefficients)

    def live_gradient(
        self,
        inputs: RowInputs,
        statistics: LinearLogprob,
        coefficients: RowCoefficients,
        *,
        has_exps: bool = False,
    ) -> LogitGradient:
        """The gradient where the buffer holds z - shift, or its exp, or x under a softcap."""
        z_RV = self.logits[: len(inputs)]
        alive, kept = coefficients.alive(), None
        if self.closes_gaps and not bool(alive.all()):
            kept = self.close_gaps_(z_RV, alive)
            z_RV, inputs = z_RV[: len(kept)], inputs.rows(kept)
            self.shift, self.total = self.shift[kept], self.total[kept]
            statistics = LinearLogprob(*(value[kept] for value in statistics))
            coefficients = coefficients.rows(kept)
        scale = self.logits_to_gradient_(z_RV, inputs, statistics, coefficients, has_exps)
        if not self.closes_gaps:
            z_RV.masked_fill_(~alive[:, None], 0.0)
            scale = torch.where(alive, scale, 0.0)
        masses = self.tile_masses(z_RV, scale, coefficients.c1) if self.keeps_masses else None
        dlogits = z_RV.to(self.operand_dtype)
        return LogitGradient(dlogits, scale, kept, None if self.closes_gaps else alive, masses)

    def tile_masses(self, dz_RV: Tensor, scale: Tensor, c1: Tensor) -> TileMasses:
        shape = len(dz_RV), num_tiles(dz_RV.shape[1])
        masses = dz_RV.new_empty(shape)
        for rows in self.blocks(len(dz_RV)):
            magnitudes = torch.abs(dz_RV[rows], out=self.block[: rows.stop - rows.start])
            masses[rows] = tile_sums(magnitudes)
        masses.mul_(scale.abs()[:, None])
        sums = tile_sums(dz_RV).mul_(scale[:, None]) if self.keeps_sums else None
        return TileMasses(masses, sums, mean_coefficient(c1, scale != 0))

    def close_gaps_(self, z_RV: Tensor, alive_R: Tensor) -> Tensor:
        """Move live rows from the end into the places of dead ones; (L,) says which row is where.

        Only as many rows move as there are gaps, so a chunk with few dead rows costs little.
        """
        num_alive = int(alive_R.sum())
        kept = torch.arange(num_alive, device=z_RV.device)
        gaps = (~alive_R[:num_alive]).nonzero().squeeze(1)
        movers = alive_R[num_alive:].nonzero().squeeze(1) + num_alive
        for rows in self.blocks(len(gaps)):
            moved = self.block[: rows.stop - rows.start]
            torch.index_select(z_RV, 0, movers[rows], out=moved)
            z_RV.index_copy_(0, gaps[rows], moved)
        kept[gaps] = movers
        return kept

    def logits_to_gradient_(
        self,
        z_RV: Tensor,
        inputs: RowInputs,
        statistics: LinearLogprob,
        coefficients: RowCoefficients,
        has_exps: bool,
    ) -> Tensor:
        """Turn what the buffer holds into dx up to a factor per row, and return that factor, (R,).

        The target's entry uses expm1(logprob): p_y - 1 would cancel where the policy is nearly
        certain.
        """
        (c1, c2, c3), total = coefficients, self.total
        logprobs, entropy, _ = statistics
        rows_R, targets = torch.arange(len(z_RV), device=z_RV.device), inputs.targets_N
        if c2 is None and c3 is None and inputs.softcap is None:
            if not has_exps:
                z_RV.exp_()
            z_RV[rows_R, targets] = torch.expm1(logprobs) * total
            return -c1 / (total * inputs.temperature)

        # dz = (e / total) (c2 (z - shift) + b), b = -c1 + c3 + c2 (H - log total), plus c1 at y
        offset = -c1 if c3 is None else c3 - c1
        at_target = -c1 * torch.expm1(logprobs)
        if c3 is not None:
            at_target = at_target + c3 * logprobs.exp()
        if c2 is not None:
            offset = offset + c2 * (entropy - total.log())
            # p log p -> 0 for a target on a -inf column
            log_p = logprobs.clamp(min=LOWEST_SHIFTED_LOGIT)
            at_target = at_target + c2 * logprobs.exp() * (log_p + entropy)
        at_target = at_target * total
        for rows in self.blocks(len(z_RV)):
            z, exps = z_RV[rows], self.block[: rows.stop - rows.start]
            slope = None if self.slope is None else self.slope[: len(z)]
            if slope is not None:
                scale_(z, inputs.rows(rows), slope).sub_(self.shift[rows, None])
            torch.exp(z, out=exps)
            if c2 is None:
                torch.mul(exps, offset[rows, None], out=z)
            else:
                torch.addcmul(offset[rows, None], z, c2[rows, None], out=z)
                z.mul_(exps)
            z[rows_R[: len(z)], targets[rows]] = at_target[rows]
            if slope is not None:
                z.mul_(slope)
        return 1.0 / (total * inputs.temperature)


def scale_(x_RV: Tensor, inputs: RowInputs, slope_RV: Tensor | None = None) -> Tensor:
    """z = softcap(x + bias) / temperature, in place of x; the softcap's derivative in `slope_RV`.

    It is 1 / cosh^2: as 1 - tanh^2 it would lose its digits where tanh nears 1.
    """
    tau = inputs.temperature
    if inputs.bias_V is not None:
        x_RV.add_(inputs.bias_V.to(x_RV.dtype)[None])
    if inputs.softcap is not None:
        x_RV.div_(inputs.softcap)
        if slope_RV is not None:
            torch.cosh(x_RV, out=slope_RV).reciprocal_().square_()
        x_RV.tanh_().mul_(inputs.softcap)
    if isinstance(tau, Tensor):
        x_RV.div_(tau[:, None])
    elif tau != 1.0:
        x_RV.div_(tau)
    return x_RV
