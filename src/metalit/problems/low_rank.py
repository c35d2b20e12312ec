"""The best approximation of a matrix by one of low rank, with missing entries."""

from typing import Any

import torch
from torch import Tensor, nn

from metalit.errors import InputError
from metalit.problem import Matrix, Problem
from metalit.problems.rows import check_size, check_task


class LowRank(Problem):
    """min ‖P(M − UVᵀ)‖²_F over U ``[rows, rank]`` and V ``[columns, rank]``, P the entries that were observed.

    Where all are, the minimum is Σ σᵢ² over i > rank (Eckart, Young 1936). Both factors are outer variables, without
    an inner one; or, with ``exact``, V is the inner variable, which ``Newton`` solves for in one step, because the loss
    is quadratic in it (variable projection, Golub, Pereyra 1973). Then inner and outer loss are the same, and by the
    envelope theorem the indirect term of the hypergradient is 0.

    Optimisers see a matrix of entries of about 1, whatever its units: it is divided by ``unit``², the power of 4 next
    to the root-mean-square of its entries, and both factors by ``unit``; so their gradients and steps are of that
    matrix. Losses, scores, results and checkpoints are in the matrix's own units.

    Attributes:
        unit: what both parameters are to be multiplied by; 1 until the matrix is known.

    Args:
        rows, columns: the shape of the matrix.
        rank: the number of columns of both factors.
        exact: whether V is solved for; it starts at 0, from where one step is exact at every scale.

    Raises:
        InputError: a size that is not positive, or a rank above it; later: a matrix of another shape, or, with
            ``exact``, a column of fewer observed entries than ``rank``.
    """

    unit: Tensor

    def __init__(self, rows: int, columns: int, rank: int = 1, exact: bool = False) -> None:
        super().__init__()
        if not 1 <= rank <= min(rows, columns):
            raise InputError(
                f"LowRank: rank={rank} must be between 1 and the smaller of rows={rows}, columns={columns}"
            )
        self.shape = (rows, columns)
        self.exact = exact
        self.u = nn.Parameter(torch.randn(rows, rank))
        # drawn in any case: what is drawn after it stays the same
        self.v = nn.Parameter(torch.randn(columns, rank) * (not exact), requires_grad=not exact)
        self.register_buffer("unit", torch.ones(()), persistent=False)
        self._is_new = True

    def init(self, outer: dict[str, Tensor], task: Matrix) -> dict[str, Tensor]:
        """Nothing, or V if it is solved for."""
        return {"v": self.v.detach()} if self.exact else {}

    def inner_loss(self, inner: dict[str, Tensor], outer: dict[str, Tensor], task: Matrix, step: int) -> Tensor:
        """The squared error over the observed entries."""
        return self.outer_loss(inner, outer, task)

    def outer_loss(self, inner: dict[str, Tensor], outer: dict[str, Tensor], task: Matrix) -> Tensor:
        """The squared error over the observed entries; its derivatives are those of the matrix divided by unit²."""
        error = self._error({**outer, **inner}, task)
        # the one in value, to the last digit, and the other in derivative
        return (self.unit**4 * error).detach() + (error - error.detach())

    def _error(self, factors: dict[str, Tensor], task: Matrix) -> Tensor:
        """The squared error of the matrix divided by unit²."""
        error = task.values / self.unit**2 - factors["u"] @ factors["v"].mT
        return (task.observed.to(error.dtype) * error.square()).sum()

    def scores(self, inner: dict[str, Tensor], outer: dict[str, Tensor], task: Matrix, split: str) -> dict[str, Tensor]:
        """The squared error and the optimum by Eckart and Young, where it is known, both relative to ‖P(M)‖²."""
        values = task.values / self.unit**2
        relative, total = self._error({**outer, **inner}, task) / values.square().sum(), values.double().square().sum()
        scores = {"loss": self.outer_loss(inner, outer, task), "relative_error": relative}
        if bool(task.observed.all()):
            rest = torch.linalg.svdvals(values.double())[outer["u"].shape[1] :].square().sum() / total
            scores["eckart_young"] = rest
            scores["excess"] = relative - rest
        return scores

    def results(self, inner: dict[str, Tensor], outer: dict[str, Tensor], task: Matrix) -> dict[str, dict[str, Tensor]]:
        """Both factors."""
        return {"u": {"u": self.unit * outer["u"]}, "v": {"v": self.unit * {**outer, **inner}["v"]}}

    def check(self, task: Matrix) -> None:
        """Take over the matrix's units.

        Raises:
            InputError: a matrix of another shape, or one that does not determine V.
        """
        check_task(self, task, Matrix, "MatrixDataModule")
        check_size("LowRank", "rows", self.shape[0], task.values.shape[0], "rows")
        check_size("LowRank", "columns", self.shape[1], task.values.shape[1], "columns")
        if not bool(task.values.any()):
            raise InputError("LowRank: every observed entry of the matrix is 0, so there is nothing to approximate")
        least, rank = int(task.observed.sum(0).min()), self.u.shape[1]
        if self.exact and least < rank:
            raise InputError(
                f"LowRank: a column has {least} observed entries, too few to solve for its {rank} factors; set "
                f"exact=false, or rank={least} at most"
            )
        self._measure(task)

    def _measure(self, task: Matrix) -> None:
        values = task.values.detach().double()
        largest = values.abs().max()  # whose squares neither vanish nor overflow
        spread = float(largest.log2() + 0.5 * ((values / largest).square().sum() / task.observed.sum()).log2())
        unit = 2.0 ** round(spread / 2)
        if not self._is_new:
            self._rescale(float(self.unit) / unit)
        self._is_new = False
        self.unit.fill_(unit)

    def _rescale(self, factor: float) -> None:
        """Multiply the parameters by a power of 2, which rounds nothing."""
        if factor != 1.0:
            with torch.no_grad():
                self.u.mul_(factor)
                self.v.mul_(factor)

    # ---- checkpoints are in the matrix's units, and know no other

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (unit := float(self.unit)) != 1.0:
            for name in ("u", "v"):
                destination[prefix + name] = destination[prefix + name] * unit

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if f"{prefix}u" in state_dict:
            self.unit.fill_(1.0)
            self._is_new = False
