"""Inner optimisers: how the inner variable is adapted to a task. One file for each."""

from metalit.inner.adam import Adam, AdamW
from metalit.inner.alfa import ALFA
from metalit.inner.base import GradFn, InnerOptimizer
from metalit.inner.learned import Learned
from metalit.inner.meta_curvature import MetaCurvature
from metalit.inner.meta_sgd import MetaSGD
from metalit.inner.newton import Newton
from metalit.inner.rmsprop import RMSprop
from metalit.inner.schedules import Cosine
from metalit.inner.sgd import SGD

__all__ = [
    "ALFA",
    "SGD",
    "Adam",
    "AdamW",
    "Cosine",
    "GradFn",
    "InnerOptimizer",
    "Learned",
    "MetaCurvature",
    "MetaSGD",
    "Newton",
    "RMSprop",
]
