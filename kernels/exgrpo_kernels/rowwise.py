"""`ChunkRows` on the Triton row kernels: buffers and launches; the kernels are in `row_kernels`."""

import math

import torch
from torch import Tensor

from exgrpo_kernels import runtime
from exgrpo_kernels.linear_head import LinearLogprob, LogitGradient, RowCoefficients, RowInputs
from exgrpo_kernels.objective import LossColumns, PolicyObjective, row_scalars
from exgrpo_kernels.row_kernels import gradient_kernel, policy_gradient_kernel, statistics_kernel
from exgrpo_kernels.sparse_backward import TileMasses, mean_coefficient, num_tiles


class TritonRows:
    """`ChunkRows` on the row kernels; the buffer holds raw logits until a gradient replaces them.

    A gradient of a narrower dtype is written to the start of its row in the same memory.
    """

    def __init__(
        self,
        logits: Tensor,
        *,
        operand_dtype: torch.dtype,
        keeps_masses: bool = False,
        keeps_sums: bool = False,
    ):
        """`logits` (R, V) is the buffer, `operand_dtype` that of the gradient put there."""
        num_columns = logits.shape[1]
        self.logits = logits
        self.narrows = operand_dtype != logits.dtype
        self.gradients = logits.view(operand_dtype)[:, :num_columns] if self.narrows else logits
        shape = len(logits), num_tiles(num_columns)
        self.masses = logits.new_empty(shape, dtype=torch.float32) if keeps_masses else None
        self.sums = logits.new_empty(shape, dtype=torch.float32) if keeps_sums else None
        self.shape = runtime.row_kernel_shape(num_columns)
        self.num_programs = runtime.num_programs(logits.device)

    def padded(self, num_rows: int) -> int:
        return runtime.padded_rows(num_rows, len(self.logits), self.logits.device)

    def statistics(self, inputs: RowInputs) -> LinearLogprob:
        out = self.new_statistics(len(inputs))
        self.launch(
            statistics_kernel,
            len(inputs),
            self.logits,
            self.logits.stride(0),
            *row_arguments(inputs),
            *out,
            len(inputs),
            self.logits.shape[1],
        )
        return out

    def gradient(
        self, inputs: RowInputs, statistics: LinearLogprob, coefficients: RowCoefficients
    ) -> LogitGradient:
        num_rows, num_padded = len(inputs), self.padded(len(inputs))
        self.launch(
            gradient_kernel,
            num_padded,
            *self.places(),
            *row_arguments(inputs),
            *(value.contiguous() for value in statistics),
            *(None if value is None else value.float().contiguous() for value in coefficients),
            num_rows,
            num_padded,
            self.logits.shape[1],
            NARROWS=self.narrows,
        )
        return self.result(num_padded, coefficients.alive(), coefficients.c1)

    def policy_gradient(
        self, inputs: RowInputs, objective: PolicyObjective, columns: LossColumns
    ) -> tuple[LinearLogprob, LogitGradient]:
        if objective.ratio_level == "sequence":
            # the coefficient of a row needs the other rows of its sequence
            statistics = self.statistics(inputs)
            scalars = row_scalars(objective, statistics.logprobs, statistics.entropy, columns)
            return statistics, self.gradient(inputs, statistics, RowCoefficients(*scalars))
        num_rows, num_padded = len(inputs), self.padded(len(inputs))
        out = self.new_statistics(num_rows)
        c1 = self.logits.new_empty(num_rows, dtype=torch.float32)
        dual_clip = math.inf if objective.dual_clip is None else objective.dual_clip
        has_kl = objective.kl_coef != 0
        # k3_plus differs from k2 in the value alone
        kl = "k2" if objective.kl_estimator == "k3_plus" else objective.kl_estimator
        self.launch(
            policy_gradient_kernel,
            num_padded,
            *self.places(),
            *row_arguments(inputs),
            columns.weights,
            columns.advantages,
            columns.behaviour_logprobs,
            columns.shaping,
            columns.ref_logprobs if has_kl else None,
            columns.kl_weights if has_kl else None,
            # an int would be compiled in
            *map(float, (*objective.ratio_bounds, dual_clip, *objective.trust_region)),
            float(objective.sapo_temperature_positive),
            float(objective.sapo_temperature_negative),
            float(objective.kl_coef),
            float(objective.entropy_coef),
            *out,
            c1,
            num_rows,
            num_padded,
            self.logits.shape[1],
            SURROGATE=objective.surrogate,
            KL=kl if has_kl else "none",
            NARROWS=self.narrows,
        )
        c2 = objective.entropy_coef * columns.weights
        return out, self.result(num_padded, RowCoefficients(c1, c2).alive(), c1)

    def result(self, num_padded: int, alive: Tensor, c1: Tensor) -> LogitGradient:
        masses = None
        if self.masses is not None:
            sums = None if self.sums is None else self.sums[:num_padded]
            mean = mean_coefficient(c1, alive)
            masses = TileMasses(self.masses[:num_padded], sums, mean)
        return LogitGradient(self.gradients[:num_padded], alive_L=alive, masses=masses)

    def new_statistics(self, num_rows: int) -> LinearLogprob:
        new = self.logits.new_empty
        return LinearLogprob(*(new(num_rows, dtype=torch.float32) for _ in range(3)))

    def places(self) -> tuple:
        """The buffers that the kernels read and write, and their strides."""
        masses = self.masses
        return (
            self.logits,
            self.logits.stride(0),
            self.gradients,
            self.gradients.stride(0),
            masses,
            self.sums,
            0 if masses is None else masses.stride(0),
        )

    def launch(self, kernel, num_rows: int, *arguments, **constants) -> None:
        if num_rows == 0:
            return
        with runtime.current_device(self.logits.device):
            kernel[(min(num_rows, self.num_programs),)](
                *arguments,
                **constants,
                BLOCK=self.shape.block,
                num_warps=self.shape.num_warps,
                maxnreg=self.shape.max_registers,
            )


def row_arguments(inputs: RowInputs) -> tuple:
    """The vectors and numbers of `RowInputs` in the order of the kernels."""
    bias, tau = inputs.bias_V, inputs.temperatures_N
    return (
        None if bias is None else bias.contiguous(),
        inputs.targets_N.contiguous(),
        None if tau is None else tau.contiguous(),
        1.0 / inputs.common_temperature,
        inputs.softcap,
    )
