"""Theory you can run: each formula is a function, and each is tested against masks."""

from forcedrop.dropout.theory.moments import JensenGap, gradient_variance, jensen_gap, second_moment_growth
from forcedrop.dropout.theory.ridge import dropout_ridge, ridge_penalty
from forcedrop.dropout.theory.sharpness import (
    HessianEigenvalue,
    filter_normalised_direction,
    largest_hessian_eigenvalue,
    perturbation_profile,
)

__all__ = [
    "HessianEigenvalue",
    "JensenGap",
    "dropout_ridge",
    "filter_normalised_direction",
    "gradient_variance",
    "jensen_gap",
    "largest_hessian_eigenvalue",
    "perturbation_profile",
    "ridge_penalty",
    "second_moment_growth",
]
