"""AWQ's rounding: to nearest on searched scales, as :mod:`phi4edge.solvers.rtn` does it.

What is AWQ's own, the scales of input channels, is folded into the weights before a solver sees them
(:mod:`phi4edge.transforms.awq`), so that it goes with any solver; under this name it always is.
"""

from __future__ import annotations

__all__ = ["NEEDS_HESSIAN", "solve"]

from phi4edge.solvers._api import Problem, Solution, SolverOptions
from phi4edge.solvers.rtn import solve as round_to_nearest

NEEDS_HESSIAN = False


def solve(problem: Problem, options: SolverOptions) -> Solution:
    """Round ``problem.weight``, whose input channels were scaled before.

    Raises:
        InputError: the group size does not divide in_features.
    """
    return round_to_nearest(problem, options)
