"""The best approximation of a matrix by one of low rank, with missing entries."""

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

    Args:
        rows, columns: the shape of the matrix.
        rank: the number of columns of both factors.
        exact: whether V is solved for.

    Raises:
        InputError: a size that is not positive, or a rank above it; later: a matrix of another shape, or, with
            ``exact``, a column of fewer observed entries than ``rank``.
    """

    def __init__(self, rows: int, columns: int, rank: int = 1, exact: bool = False) -> None:
        super().__init__()
        if not 1 <= rank <= min(rows, columns):
            raise InputError(
                f"LowRank: rank={rank} must be between 1 and the smaller of rows={rows}, columns={columns}"
            )
        self.shape = (rows, columns)
        self.exact = exact
        self.u = nn.Parameter(torch.randn(rows, rank))
        self.v = nn.Parameter(torch.randn(columns, rank), requires_grad=not exact)

    def init(self, outer: dict[str, Tensor], task: Matrix) -> dict[str, Tensor]:
        """Nothing, or V if it is solved for."""
        return {"v": self.v.detach()} if self.exact else {}

    def inner_loss(self, inner: dict[str, Tensor], outer: dict[str, Tensor], task: Matrix, step: int) -> Tensor:
        """The squared error over the observed entries."""
        return self.outer_loss(inner, outer, task)

    def outer_loss(self, inner: dict[str, Tensor], outer: dict[str, Tensor], task: Matrix) -> Tensor:
        """The squared error over the observed entries."""
        factors = {**outer, **inner}
        error = task.values - factors["u"] @ factors["v"].mT
        return (task.observed.to(error.dtype) * error.square()).sum()

    def scores(self, inner: dict[str, Tensor], outer: dict[str, Tensor], task: Matrix, split: str) -> dict[str, Tensor]:
        """The squared error and the optimum by Eckart and Young, where it is known, both relative to ‖P(M)‖²."""
        loss, total = self.outer_loss(inner, outer, task), task.values.square().sum()
        scores = {"loss": loss, "relative_error": loss / total}
        if bool(task.observed.all()):
            rest = torch.linalg.svdvals(task.values.double())[outer["u"].shape[1] :].square().sum()
            scores["eckart_young"] = rest / total
            scores["excess"] = loss / total - rest / total
        return scores

    def results(self, inner: dict[str, Tensor], outer: dict[str, Tensor], task: Matrix) -> dict[str, dict[str, Tensor]]:
        """Both factors."""
        return {"u": {"u": outer["u"]}, "v": {"v": {**outer, **inner}["v"]}}

    def check(self, task: Matrix) -> None:
        """Raise an ``InputError`` for a matrix of another shape, or one that does not determine V."""
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
