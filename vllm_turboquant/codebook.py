"""Lloyd-Max codebooks for a coordinate of a randomly rotated vector.

A coordinate of a uniformly random vector of norm sqrt(d) in R^d has the density

    f(x)  ~  (1 - x^2 / d)^((d - 3) / 2),     |x| < sqrt(d),     E[x^2] = 1

(arXiv 2504.19874, Lemma 1, scaled by sqrt(d)), close to a standard normal one for d = 64 and 128.
Codebooks are solved for exactly this density; nothing here is a table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(96)


@dataclass(frozen=True)
class Codebook:
    """The optimal scalar quantizer of ``2 ** bits`` levels for dimension ``dim``.

    Attributes:
        dim: Dimension d of the rotated vectors, which have norm sqrt(d).
        centroids: Levels in ascending order, symmetric about 0; float64 values.
        boundaries: The ``len(centroids) - 1`` midpoints between neighbouring levels.
        distortion: E[(x - centroid(x))^2] for E[x^2] = 1; D_mse of arXiv 2504.19874, Theorem 1.
    """

    dim: int
    centroids: tuple[float, ...]
    boundaries: tuple[float, ...]
    distortion: float

    @property
    def qjl_scale(self) -> float:
        """rho = sqrt(2 / pi) * sqrt(distortion): the size that a residual sign stands for.

        For a residual with coordinates of variance ``distortion``, E|z| = rho, so rho * sign(z) is
        the least-squares estimate of z from its sign. The unbiased factor of arXiv 2406.03482 would
        be larger and add variance; here one scale per vector removes the bias instead.
        """
        return math.sqrt(2 / math.pi * self.distortion)


def _moments(lower: float, upper: float, dim: int) -> tuple[float, float]:
    """Unnormalized mass and first moment of f on [lower, upper], by Gauss-Legendre quadrature."""
    x = (upper - lower) / 2 * _NODES + (upper + lower) / 2
    density = (upper - lower) / 2 * _WEIGHTS * (1 - x * x / dim) ** ((dim - 3) / 2)
    return float(density.sum()), float((density * x).sum())


@cache
def solve_codebook(bits: int, dim: int) -> Codebook:
    """Solve the Lloyd-Max conditions by fixed-point iteration.

    Args:
        bits: Bits per coordinate, 1 to 6. 0 gives the one-level codebook {0}.
        dim: Dimension d of the rotated vectors, at least 3.

    Returns:
        The codebook; centroids agree with the optimum to about 1e-13.
    """
    # Beyond 8 standard deviations the density holds less than 1e-15 of the mass.
    edge = min(math.sqrt(dim), 8.0)
    half = 2**bits // 2
    if half == 0:
        return Codebook(dim, (0.0,), (), 1.0)
    positive = np.linspace(0.5, half - 0.5, half) * (2.5 / half)  # any ascending start converges
    mass = np.empty(half)
    for _ in range(20_000):
        cuts = [0.0, *((positive[1:] + positive[:-1]) / 2).tolist(), edge]
        moments = [_moments(a, b, dim) for a, b in pairwise(cuts)]
        updated = np.array([first / zeroth for zeroth, first in moments])
        mass = np.array([zeroth for zeroth, _ in moments])
        change = float(np.abs(updated - positive).max())
        positive = updated
        if change < 1e-15:
            break
    centroids = np.concatenate([-positive[::-1], positive])
    boundaries = (centroids[1:] + centroids[:-1]) / 2
    boundaries[half - 1] = 0.0
    # Centroids are conditional means, so E[(x - c)^2] = E[x^2] - E[c^2].
    distortion = 1.0 - float((mass * positive**2).sum() / mass.sum())
    return Codebook(dim, tuple(centroids.tolist()), tuple(boundaries.tolist()), distortion)
