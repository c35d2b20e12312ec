"""Derivatives of functions and of ready-made modules, which stay exactly as they were. One file for each kind."""

from metalit.autodiff.draws import draws
from metalit.autodiff.functional import call, sees_other_rows
from metalit.autodiff.per_sample import per_sample_gradients, per_sample_hessian, per_sample_jacobian
from metalit.autodiff.perturbations import SAM, AdaptiveSAM, Perturbation, WeightNoise
from metalit.autodiff.perturbed import PerturbedGradient, gradient_at, perturbed_gradient
from metalit.autodiff.second import hessian_products

__all__ = [
    "SAM",
    "AdaptiveSAM",
    "Perturbation",
    "PerturbedGradient",
    "WeightNoise",
    "call",
    "draws",
    "gradient_at",
    "hessian_products",
    "per_sample_gradients",
    "per_sample_hessian",
    "per_sample_jacobian",
    "perturbed_gradient",
    "sees_other_rows",
]
