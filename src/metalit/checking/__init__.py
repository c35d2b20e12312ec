"""What is checked before a long run: the outer gradient, the inner level, every estimator, memory, planted faults."""

from metalit.checking.check import check
from metalit.checking.report import CheckReport

__all__ = ["CheckReport", "check"]
