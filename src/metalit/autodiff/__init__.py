"""Derivatives of functions and of ready-made modules, which stay exactly as they were. One file for each kind."""

from metalit.autodiff.module import call, draws, sees_other_rows
from metalit.autodiff.second import hessian_products

__all__ = ["call", "draws", "hessian_products", "sees_other_rows"]
