"""What an outer step is taken at, beside its data."""

from typing import NamedTuple

from torch import Tensor

from metalit.adapt import Outer


class StepContext(NamedTuple):
    """The outer variable, the loss scale, and the number of the step.

    Its tensors stay the same from step to step and are filled anew, so that a compiled program reads present values
    without a new form.

    Attributes:
        outer: the outer variable, detached.
        scale: what the gradient is multiplied by in 16-mixed precision (:mod:`metalit.training.loss_scale`), or None.
        progress: how many outer steps were taken before, of no dimensions and type int64.
        form: a number that is another one where what is evaluated takes another form, so that each is a program.
    """

    outer: Outer
    scale: Tensor | None
    progress: Tensor
    form: int = 0
