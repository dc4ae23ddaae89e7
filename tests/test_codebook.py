"""Codebooks against the conditions that define them, integrated independently with mpmath."""

from __future__ import annotations

import math
import struct
from functools import cache
from itertools import pairwise

import mpmath
import numpy as np
import pytest

from vllm_turboquant.codebook import Codebook, solve_codebook

# The accuracy that solve_codebook states.
SOLVER_ERROR = 1e-13

# D_mse(1..4) of arXiv 2504.19874 (Theorem 1 and the text), and one unit of the last printed digit.
PAPER_DISTORTION = {1: (0.36, 0.01), 2: (0.117, 0.001), 3: (0.034, 0.001), 4: (0.0095, 0.0001)}

# Positive levels of the Gaussian Lloyd-Max quantizer, four digits.
GAUSSIAN_LEVELS = {
    1: (0.7979,),
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1520),
    4: (0.1284, 0.3881, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326),
}


def cells(book: Codebook) -> list[tuple[float, float]]:
    """Each level's interval, the outer ones up to the end of the support."""
    edge = math.sqrt(book.dim)
    return list(pairwise((-edge, *book.boundaries, edge)))


@cache
def moments(dim: int, lower: float, upper: float) -> tuple[float, float, float]:
    """Mass, first and second moment of the unnormalized density on [lower, upper]."""

    def density(x: mpmath.mpf) -> mpmath.mpf:
        return max(0, 1 - x * x / dim) ** (mpmath.mpf(dim - 3) / 2)

    def moment(power: int) -> float:
        return float(mpmath.quad(lambda x: x**power * density(x), [lower, upper]))

    return moment(0), moment(1), moment(2)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
class TestLloydMax:
    def test_levels_are_conditional_means(self, bits: int, dim: int) -> None:
        book = solve_codebook(bits, dim)
        for level, (lower, upper) in zip(book.centroids, cells(book), strict=True):
            mass, first, _ = moments(dim, lower, upper)
            assert level == pytest.approx(first / mass, rel=0, abs=SOLVER_ERROR)

    def test_boundaries_are_midpoints(self, bits: int, dim: int) -> None:
        book = solve_codebook(bits, dim)
        middle = [(a + b) / 2 for a, b in pairwise(book.centroids)]
        assert book.boundaries == pytest.approx(middle, rel=0, abs=2**-52)

    def test_symmetric_and_ascending(self, bits: int, dim: int) -> None:
        book = solve_codebook(bits, dim)
        assert len(book.centroids) == 2**bits
        assert book.centroids == tuple(-c for c in reversed(book.centroids))
        assert book.boundaries == tuple(-b for b in reversed(book.boundaries))
        assert all(a < b for a, b in pairwise(book.centroids))

    def test_distortion_is_the_mean_squared_error(self, bits: int, dim: int) -> None:
        book = solve_codebook(bits, dim)
        total = error = 0.0
        for level, (lower, upper) in zip(book.centroids, cells(book), strict=True):
            mass, first, second = moments(dim, lower, upper)
            total += mass
            error += second - 2 * level * first + level**2 * mass
        assert book.distortion == pytest.approx(error / total, rel=0, abs=SOLVER_ERROR)

    def test_distortion_by_sampling(self, bits: int, dim: int) -> None:
        """Quantize uniform points of the sphere; 3.3 standard errors are a 99.9 % interval."""
        book = solve_codebook(bits, dim)
        points = np.random.default_rng(bits * dim).standard_normal((4000, dim))
        points *= math.sqrt(dim) / np.linalg.norm(points, axis=1, keepdims=True)
        index = np.searchsorted(book.boundaries, points)
        error = ((points - np.array(book.centroids)[index]) ** 2).mean(axis=1)
        assert abs(error.mean() - book.distortion) < 3.3 * error.std(ddof=1) / math.sqrt(4000)


@cache
def gaussian_limit(bits: int) -> tuple[float, float]:
    """Distortion for d -> infinity and the coefficient of 1 / d in D(d).

    The density is phi(x) (1 + (3 x^2 / 2 - x^4 / 4 - 3 / 4) / d + O(1 / d^2)), and at the optimum
    a change of the quantizer has no first-order effect, so the coefficient is the error of the
    Gaussian quantizer weighted by that polynomial.
    """
    book = solve_codebook(bits, 10**6)
    limit = slope = mpmath.mpf(0)
    for level, (lower, upper) in zip(book.centroids, cells(book), strict=True):
        ends = [max(lower, -12.0), min(upper, 12.0)]

        def error(x: mpmath.mpf, level: float = level) -> mpmath.mpf:
            return (x - level) ** 2 * mpmath.npdf(x)

        def change(x: mpmath.mpf, level: float = level) -> mpmath.mpf:
            return error(x, level) * (1.5 * x**2 - x**4 / 4 - 0.75)

        limit += mpmath.quad(error, ends)
        slope += mpmath.quad(change, ends)
    return float(limit), float(slope)


@pytest.mark.parametrize("bits", PAPER_DISTORTION)
def test_distortion_of_the_paper(bits: int) -> None:
    """The paper prints the Gaussian limit; what is left at d = 64 and 128 is the term in 1 / d."""
    published, unit = PAPER_DISTORTION[bits]
    limit, slope = gaussian_limit(bits)
    assert abs(limit - published) < unit
    rest = {d: solve_codebook(bits, d).distortion - limit - slope / d for d in (64, 128, 256)}
    # Doubling d quarters a remainder of second order; a wrong slope would leave one of first order.
    assert 3 < rest[64] / rest[128] < 5
    assert 3 < rest[128] / rest[256] < 5


@pytest.mark.parametrize("bits", GAUSSIAN_LEVELS)
def test_levels_tend_to_the_gaussian_ones(bits: int) -> None:
    positive = solve_codebook(bits, 10**6).centroids[2 ** (bits - 1) :]
    # Half a unit of the fourth digit, and a few 1e-6 for d = 1e6.
    assert positive == pytest.approx(GAUSSIAN_LEVELS[bits], rel=0, abs=6e-5)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_uniform_density_at_dimension_three(bits: int) -> None:
    """A coordinate of the sphere in R^3 is uniform, where the optimum is known exactly."""
    book = solve_codebook(bits, 3)
    step = 2 * math.sqrt(3) / 2**bits
    expected = [(j + 0.5) * step - math.sqrt(3) for j in range(2**bits)]
    assert book.centroids == pytest.approx(expected, rel=0, abs=SOLVER_ERROR)
    assert book.distortion == pytest.approx(4.0**-bits, rel=0, abs=SOLVER_ERROR)


def test_zero_bits() -> None:
    book = solve_codebook(0, 128)
    assert (book.centroids, book.boundaries, book.distortion) == ((0.0,), (), 1.0)


@pytest.mark.parametrize("dim", [64, 128])
def test_one_bit_level_is_the_mean_absolute_coordinate(dim: int) -> None:
    """sqrt(d) E|e_1| = sqrt(d / pi) Gamma(d / 2) / Gamma((d + 1) / 2) on the unit sphere."""
    expected = math.sqrt(dim / math.pi) * math.exp(
        math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)
    )
    assert solve_codebook(1, dim).centroids[1] == pytest.approx(expected, rel=0, abs=SOLVER_ERROR)


@pytest.mark.parametrize("dim", [64, 128])
def test_qjl_scale_is_least_squares(dim: int) -> None:
    """rho minimizes E(z - rho sign z)^2 = v - 2 rho sqrt(2 v / pi) + rho^2, z normal."""
    book = solve_codebook(2, dim)

    def error(rho: float) -> float:
        return rho**2 - 2 * rho * math.sqrt(2 * book.distortion / math.pi)

    best = book.qjl_scale
    assert error(best) < min(error(best * (1 + 1e-6)), error(best * (1 - 1e-6)))


# float32 of the positive levels, the positive boundary and rho at 2 bits, as big-endian hex.
PINNED = {
    64: ("3ee77c23", "3fbfff2d", "3f79de35", "3e8a3fb6"),
    128: ("3ee7a7f4", "3fc0aa2a", "3f7a9427", "3e8b22c9"),
}


@pytest.mark.parametrize("dim", PINNED)
def test_format_constants_are_pinned(dim: int) -> None:
    book = solve_codebook(2, dim)
    values = (*book.centroids[2:], book.boundaries[2], book.qjl_scale)
    assert tuple(struct.pack(">f", value).hex() for value in values) == PINNED[dim]
    # No value is so near a rounding tie that another platform's last bits could move it.
    for value in values:
        distance = abs(value - float(np.float32(value)))
        assert float(np.spacing(np.float32(value))) / 2 - distance > 100 * SOLVER_ERROR
