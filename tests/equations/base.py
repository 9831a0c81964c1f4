"""How the checks of the paper's equations are written down; EQUATIONS.md lists what they found."""
from typing import Callable, NamedTuple

import torch

SEEDS = range(3)
MISPRINTED = {11, 22, 23, 37, 38, 43, 46, 52, 54, 60, 63, 64, 66, 71, 78, 79, 80, 82, 83, 87}
CHECKS = {}

class Check(NamedTuple):
    """One equation: what computes it, and a function of a seed that returns residuals."""

    function: Callable
    computed_by: tuple  # "script.function", each of which the function is seen to call
    bound: float  # residuals of the equation, corrected where it is misprinted, are below this
    margin: float | None  # residuals of the printed form, where misprinted, are above this

def equation(number, *computed_by, bound=1e-10, margin=None):
    """Registers a check: seed -> residual, or for a misprint (residual, residual as printed).

    Residuals are numbers or tensors, of which the largest magnitude counts, or lists of such. That
    of the printed form must be large on every seed. computed_by names functions of the scripts, as
    "soft_dqn.targets", through which the residual is computed: a test watches that they are called.
    """
    def register(function):
        assert number not in CHECKS and (margin is not None) == (number in MISPRINTED), number
        CHECKS[number] = Check(function, computed_by, bound, margin)
        return function
    return register

def size(residual):
    """The largest magnitude in a number, a tensor or a list of such; NaN counts as infinite."""
    if isinstance(residual, (list, tuple)):
        return max(map(size, residual))
    largest = float(torch.as_tensor(residual).abs().max())
    return largest if largest == largest else float("inf")

def generator(seed):
    return torch.Generator().manual_seed(seed)
