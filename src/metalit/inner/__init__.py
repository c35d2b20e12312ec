"""Inner optimisers: how the inner variable is adapted to a task. One file for each."""

from metalit.inner.base import GradFn, InnerOptimizer
from metalit.inner.meta_sgd import MetaSGD
from metalit.inner.newton import Newton
from metalit.inner.sgd import SGD

__all__ = ["SGD", "GradFn", "InnerOptimizer", "MetaSGD", "Newton"]
