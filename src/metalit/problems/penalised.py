"""Linear models with a penalty for each feature, learned on validation rows: ridge and logistic regression."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metalit.errors import InputError
from metalit.problem import Inner, Splits
from metalit.problems.rows import Batch, RowsProblem, check_size

_GRID = (-6.0, -4.0, -2.0, 0.0)  # log-penalties of the baselines that penalise all features alike
_LARGEST = 80.0  # its exponential is finite in single precision


class _Penalised(RowsProblem):
    """inner_loss = mean row loss + ½ Σⱼ exp(φⱼ) wⱼ², φ the log-penalty of each feature.

    Args:
        features: the number of input columns; in a configuration, ``auto`` for as many as the data has.
        log_penalty: where every φⱼ starts.
        intercept: add a constant to the prediction, which is not penalised.
        batch, outer_batch: see :class:`~metalit.problems.rows.RowsProblem`.

    Raises:
        InputError: no feature; later: a table of another number of columns, or of other targets.
    """

    def __init__(
        self,
        features: int | Literal["auto"],
        log_penalty: float = 0.0,
        intercept: bool = True,
        batch: Batch = "all",
        outer_batch: Batch = "all",
    ) -> None:
        super().__init__(batch, outer_batch)
        if features == "auto":
            raise InputError(
                f"{type(self).__name__}: features='auto' is for a configuration; give the number of columns"
            )
        if features < 1:
            raise InputError(f"{type(self).__name__}: features={features} must be at least 1")
        if not -math.inf < log_penalty <= _LARGEST:
            raise InputError(
                f"{type(self).__name__}: log_penalty={log_penalty} must be finite, and {_LARGEST} at most, such as -2: "
                "its exponential is the penalty"
            )
        self.features = features
        self.intercept = intercept
        self.log_penalty = nn.Parameter(self.written("log_penalty", [log_penalty] * features))

    def init(self, outer: dict[str, Tensor], task: Splits) -> dict[str, Tensor]:
        """Zeros: ``weight`` of shape ``[features]`` and, if there is an intercept, ``bias``."""
        zeros = torch.zeros_like(outer["log_penalty"])
        return {"weight": zeros, "bias": zeros[0]} if self.intercept else {"weight": zeros}

    def predict(self, inner: dict[str, Tensor], x: Tensor) -> Tensor:
        """xᵀw (+ bias), ``[rows]``."""
        return x @ inner["weight"] + inner.get("bias", 0.0)

    def penalty(self, inner: dict[str, Tensor], outer: dict[str, Tensor]) -> Tensor:
        """½ Σⱼ exp(φⱼ) wⱼ²."""
        return 0.5 * (outer["log_penalty"].exp() * inner["weight"].square()).sum()

    def scores(self, inner: Inner, outer: dict[str, Tensor], task: Splits, split: str) -> dict[str, Tensor]:
        """The scores of the rows; where columns of noise were added, the mean log-penalties of both kinds too."""
        scores = super().scores(inner, outer, task, split)
        if bool(task.noise.any()):
            scores["log_penalty_noise"] = outer["log_penalty"][task.noise].mean()
            scores["log_penalty_real"] = outer["log_penalty"][~task.noise].mean()
        return scores

    def baselines(self, outer: dict[str, Tensor], task: Splits) -> dict[str, tuple[dict[str, Tensor], Splits]]:
        """The same penalty for all features, for some values of it."""
        same = {f"{math.exp(value):.3g} for all": torch.full_like(outer["log_penalty"], value) for value in _GRID}
        return {name: ({"log_penalty": value}, task) for name, value in same.items()}

    def results(self, inner: dict[str, Tensor], outer: dict[str, Tensor], task: Splits) -> dict[str, dict[str, Tensor]]:
        """``features``: their log-penalties and weights."""
        return {"features": {"log_penalty": outer["log_penalty"], "weight": inner["weight"]}}

    def check(self, task: Splits) -> None:
        """Raise an ``InputError`` for a table of another number of columns, or of other targets."""
        super().check(task)
        check_size(type(self).__name__, "features", self.features, task.train.x.shape[-1], "input columns")


class Ridge(_Penalised):
    """Ridge regression: row loss ½(xᵀw − y)².

    With λ = exp(φ), H = XᵀX/n + diag(λ) and q = H⁻¹ X_vᵀ(X_v w − y_v)/n_v: ∂outer_loss/∂φⱼ = −λⱼ wⱼ qⱼ (Bengio 2000,
    "Gradient-based optimization of hyperparameters"); an intercept is a column of ones in X whose λ is 0.
    """

    def row_losses(self, prediction: Tensor, y: Tensor) -> Tensor:
        """½(prediction − y)²."""
        return 0.5 * (prediction - y.reshape(prediction.shape)).square()

    def check_targets(self, y: Tensor) -> None:
        """One column of real numbers."""
        if not y.is_floating_point() or y.numel() != len(y):
            raise InputError("Ridge: the targets must be one column of real numbers; for two classes there is Logistic")
        if bool((y == y.flatten()[0]).all()):
            raise InputError(
                f"Ridge: the targets of a split are all {y.flatten()[0].item():.4g}: nothing can be fitted"
            )


class Logistic(_Penalised):
    """Logistic regression of two classes, 0 and 1: row loss log(1 + exp(xᵀw)) − y xᵀw (Do, Foo, Ng 2007)."""

    def row_losses(self, prediction: Tensor, y: Tensor) -> Tensor:
        """−log σ(±prediction)."""
        return F.softplus(prediction) - y * prediction

    def answers(self, prediction: Tensor) -> Tensor:
        """Class 1 where it is likelier."""
        return (prediction > 0).long()

    def check_targets(self, y: Tensor) -> None:
        """Two classes."""
        if y.is_floating_point() or y.dim() != 1 or int(y.min()) < 0 or int(y.max()) > 1:
            raise InputError(
                f"Logistic: the targets must be the classes 0 and 1, [rows], and are {tuple(y.shape)} of {y.dtype}, "
                f"{y.min().item()} to {y.max().item()}; for real numbers there is Ridge"
            )
