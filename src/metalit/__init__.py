"""Learning to learn on PyTorch Lightning: meta-learning and bilevel optimisation.

The main path: :mod:`metalit.problem` says what is optimised, :mod:`metalit.adapt` is the inner loop,
:mod:`metalit.hypergradients` how the outer variable learns through it, :mod:`metalit.modules` trains that under the
Trainer, and ``configs/*.yaml`` put the pieces together.

``metalit.check(learner, tasks)`` checks a learner before a long run (:mod:`metalit.checking`).
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """``metalit.check``, once it is asked for: the package itself imports nothing, so that help need not wait."""
    if name == "check":
        return import_module("metalit.checking").check
    raise AttributeError(f"module 'metalit' has no attribute {name!r}")
