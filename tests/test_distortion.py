"""The measurements agree with theory, would notice a wrong code, and know their own error."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from vllm_turboquant import distortion, paper, reference
from vllm_turboquant.codebook import Codebook, solve_codebook
from vllm_turboquant.distortion import (
    MIN_VECTORS,
    NUM_BATCHES,
    PUBLISHED_MSE,
    PUBLISHED_PROD,
    Code,
    Fidelity,
    KeyModel,
    absmax,
    correlation,
    distance_codes,
    gaussian_vectors,
    generator_for,
    measure,
    measure_all,
    measure_centering,
    mse_codes,
    pair_distances,
    prod_codes,
    random_vectors,
    three_bit_codes,
)
from vllm_turboquant.estimate import Estimate

T_999 = 4.07  # 99.9 % of Student's distribution with NUM_BATCHES - 1 degrees of freedom
pytestmark = pytest.mark.usefixtures("one_thread")
NUM_VECTORS = 4096
#: Squared errors to 5e-5, from test_reference.py.
FORMAT_ERRORS = {
    ("turboquant3 key", 64): 0.0424,
    ("turboquant3 key", 128): 0.0435,
    ("turboquant3 value", 64): 0.1281,
    ("turboquant3 value", 128): 0.1305,
}


@cache
def gaussian(dim: int, num_vectors: int = NUM_VECTORS) -> Tensor:
    return random_vectors("Gaussian", num_vectors, dim, seed=0)


def agrees(estimate: Estimate, expected: float, dropped: float = 0.0) -> bool:
    """``expected``, known up to ``dropped``, is in the 99.9 % interval of the estimate."""
    return abs(estimate.mean - expected) <= T_999 * estimate.error + dropped


def agrees_with_theory(found: Fidelity, dim: int) -> bool:
    """All four estimates are what theory expects."""
    expected, dropped = found.expected, 0.0
    assert expected is not None
    if found.code.startswith("turboquant3"):
        # Theory leaves out terms of relative size 1 / d; test_reference.py measures the same.
        precise = FORMAT_ERRORS[found.code, dim]
        assert expected == pytest.approx(precise, rel=1 / dim)
        expected, dropped = precise, 5e-5
    shrinks = found.code in ("TurboQuant_mse", "Lloyd-Max, no QJL")  # <x, x^> = (1 - D) |x|^2
    bias = -expected if shrinks else 0.0
    if "orthogonal" in found.code:  # see TurboQuantProd
        c1 = solve_codebook(1, dim).centroids[1]
        bias = solve_codebook(2, dim).distortion * (math.sqrt(math.pi / 2) * c1 - 1)
    return (
        agrees(found.squared_error, expected, dropped)
        and agrees(found.product_error, expected, dropped)
        and agrees(found.bias, bias)
        and agrees(found.variance, expected - bias**2, dropped)
    )


def code_named(name: str, bits: int, dim: int) -> Code:
    codes = [*mse_codes(dim), *prod_codes(dim), *three_bit_codes(dim)]
    return next(code for code in codes if (code.name, code.bits) == (name, bits))


NAMES = [
    *(("TurboQuant_mse", bits) for bits in PUBLISHED_MSE),
    *(("TurboQuant_prod", bits) for bits in PUBLISHED_PROD),
    *((code.name, code.bits) for code in three_bit_codes(64)),
]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("name", "bits"), NAMES)
def test_codes_agree_with_theory(name: str, bits: int, dim: int) -> None:
    found = measure(code_named(name, bits, dim), gaussian(dim), seed=0)
    assert agrees_with_theory(found, dim), found
    assert found.bound == 4**-bits < found.squared_error.mean


@pytest.mark.parametrize("bits", PUBLISHED_MSE)
def test_measured_distortion_is_the_published_one(bits: int) -> None:
    """Up to sampling error, one unit of the last printed digit, and what a finite d changes."""
    found = measure(code_named("TurboQuant_mse", bits, 128), gaussian(128), seed=0)
    finite = solve_codebook(bits, 100_000).distortion - solve_codebook(bits, 128).distortion
    unit = {0.36: 0.01, 0.117: 0.001, 0.03: 0.01, 0.009: 0.001}[PUBLISHED_MSE[bits]]
    assert found.published == PUBLISHED_MSE[bits]
    assert agrees(found.squared_error, found.published, unit + finite)


@pytest.mark.parametrize("bits", PUBLISHED_PROD)
def test_measured_product_distortion_is_the_published_one(bits: int) -> None:
    """As above; at 4 bits the paper's 0.047 is pi / 2 times its 0.03, rounded from 0.0345."""
    found = measure(code_named("TurboQuant_prod", bits, 128), gaussian(128), seed=0)
    exact = math.pi / 2 * solve_codebook(bits - 1, 100_000).distortion
    unit = {1.57: 0.01, 0.56: 0.01, 0.18: 0.01, 0.047: 0.001}[PUBLISHED_PROD[bits]]
    rounded = math.pi / 2 * (PUBLISHED_MSE[bits - 1] if bits > 1 else 1.0)
    assert found.published == PUBLISHED_PROD[bits]
    assert abs(rounded - found.published) < unit
    finite = exact - (found.expected or 0.0)
    assert agrees(found.product_error, found.published, unit + finite + abs(exact - rounded))


def has_gaussian_qjl(name: str) -> bool:
    return name in ("TurboQuant_prod", "QJL, Gaussian S")


@pytest.mark.parametrize(("name", "bits"), NAMES[:4] + NAMES[5:])
def test_a_scaled_codebook_is_noticed(
    name: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Levels and boundaries too large by a tenth; all codes but TurboQuant_prod of 1 bit have some.

    A Gaussian QJL repairs most of what a wrong first stage leaves, within its own noise, so there
    only grosser mistakes show. The first stage is TurboQuant_mse, where a tenth does.
    """
    factor = 1.3 if has_gaussian_qjl(name) else 1.1

    def scaled_codebook(bits: int, dim: int) -> Codebook:
        book = solve_codebook(bits, dim)
        levels, boundaries = (
            tuple(factor * x for x in part) for part in (book.centroids, book.boundaries)
        )
        return replace(book, centroids=levels, boundaries=boundaries)

    code = code_named(name, bits, 64)
    monkeypatch.setattr(paper, "solve_codebook", scaled_codebook)
    monkeypatch.setattr(reference, "solve_codebook", scaled_codebook)
    assert not agrees_with_theory(measure(code, gaussian(64, 16_384), seed=0), 64)


@pytest.mark.parametrize(("name", "bits"), NAMES)
def test_a_reconstruction_scaled_by_a_hundredth_is_noticed(name: str, bits: int) -> None:
    """Even where the squared error hardly changes, the bias shows it."""
    code = code_named(name, bits, 128)

    def draw(generator: torch.Generator) -> distortion.Codec:
        right = code.draw(generator)
        return lambda x: 1.01 * right(x)

    found = measure(replace(code, draw=draw), gaussian(128), seed=0)
    if has_gaussian_qjl(name):  # its own noise may hide this; that noise repeats, so compare
        right_bias = measure(code, gaussian(128), seed=0).bias.mean
        assert found.bias.mean - right_bias == pytest.approx(0.01, rel=0.05)
    else:
        assert not agrees_with_theory(found, 128)


def test_planted_bias_and_noise_are_found() -> None:
    """x^ = 0.9 x + 0.1 |x| times a random unit vector."""

    def draw(generator: torch.Generator) -> distortion.Codec:
        def codec(x: Tensor) -> Tensor:
            noise = normalize(gaussian_vectors(*x.shape, generator), dim=-1)
            return 0.9 * x + 0.1 * x.norm(dim=-1, keepdim=True) * noise

        return codec

    found = measure(Code("planted", 3, draw), 7 * gaussian(64), seed=0)
    assert agrees(found.bias, -0.1)
    assert agrees(found.variance, 0.01)
    assert agrees(found.squared_error, 0.02)
    assert agrees(found.product_error, 0.02)
    assert max(found.bias.error, found.variance.error, found.squared_error.error) < 1e-3


def test_distortion_of_the_paper_does_not_depend_on_the_data() -> None:
    """Key-like vectors have the same error under a uniformly random rotation."""
    vectors = random_vectors("key-like", NUM_VECTORS, 64, seed=0)
    for code in (*mse_codes(64), *prod_codes(64)):
        assert agrees_with_theory(measure(code, vectors, seed=0), 64), code.name


def test_standard_errors_are_right() -> None:
    """Over many seeds, estimates scatter as much as each of them says."""
    code = code_named("TurboQuant_mse", 2, 64)
    found = [
        measure(code, random_vectors("Gaussian", MIN_VECTORS, 64, seed), seed) for seed in range(60)
    ]
    for name in ("squared_error", "product_error", "bias", "variance"):
        estimates = [getattr(each, name) for each in found]
        scatter = torch.tensor([each.mean for each in estimates]).std().item()
        claimed = sum(each.error**2 for each in estimates) / len(estimates)
        # The variance of 60 normal numbers is known to sqrt(2 / 59), 18 %; three times that.
        assert claimed == pytest.approx(scatter**2, rel=0.55), name


def test_correlation() -> None:
    x = gaussian_vectors(NUM_BATCHES, 50, generator_for(0, "x"))
    noise = gaussian_vectors(NUM_BATCHES, 50, generator_for(0, "noise"))
    expected = torch.corrcoef(torch.stack([x.flatten(), (x + noise).flatten()]))[0, 1]
    found = correlation(x, x + noise)
    assert found.mean == pytest.approx(expected.item(), abs=1e-12)
    assert found.error == pytest.approx((1 - 0.5) / math.sqrt(x.numel()), rel=0.6)  # (1 - r^2)
    assert correlation(x, 2 * x + 1) == Estimate(pytest.approx(1.0), pytest.approx(0.0, abs=1e-9))


def test_correlation_with_a_constant_is_zero() -> None:
    """A code that cannot tell vectors apart: JSON has no NaN."""
    x = gaussian_vectors(NUM_BATCHES, 5, generator_for(0, "x"))
    assert correlation(x, torch.zeros_like(x)) == Estimate(0.0, 0.0)


def test_pairs_are_disjoint_neighbours() -> None:
    """Vector n is at n^2 on a line; the last 5, too few for a pair in every batch, are left out."""
    line = torch.arange(NUM_BATCHES * 6 + 5, dtype=torch.float64)
    vectors = torch.stack([line**2, torch.zeros_like(line)], dim=-1)
    true, decoded = pair_distances(Code("half", 3, lambda _: lambda x: x / 2), vectors, seed=0)
    first = torch.arange(0, NUM_BATCHES * 6, 2)
    assert torch.equal(true.flatten(), (2 * first + 1).double())
    assert torch.equal(decoded, true / 2)


def test_rotation_keeps_distances_of_keys_and_absmax_does_not() -> None:
    found = {
        (data, code.name): correlation(*pair_distances(code, vectors, seed=0)).mean
        for data in ("Gaussian", "key-like")
        for vectors in [random_vectors(data, NUM_VECTORS, 128, seed=0)]
        for code in distance_codes(vectors)
    }
    assert found["Gaussian", "absmax, 8 levels"] > 0.93  # Gaussian vectors need no rotation
    assert found["key-like", "absmax, 7 levels"] < 0.6
    assert found["key-like", "absmax, 8 levels"] < 0.6
    assert found["key-like", "rotated, Lloyd-Max"] > 0.92
    assert found["key-like", "turboquant3 key"] > 0.94
    assert found["key-like", "turboquant3 key, centered"] > 0.98


def test_absmax() -> None:
    x = torch.tensor([[-2.0, -0.2, 0.0, 0.5, 1.9], [7.0, 0.4, -0.6, 3.0, -7.0]]).double()
    step = 2 / 3
    expected = torch.tensor([[-3 * step, 0, 0, step, 3 * step], [7, 0, 0, 7 / 3, -7]]).double()
    torch.testing.assert_close(absmax(x, 7), expected)
    wide = absmax(gaussian(64), 8)
    levels = (wide / wide.abs().amax(dim=-1, keepdim=True) * 7).unique()
    torch.testing.assert_close(levels.round().unique(), torch.arange(-7.0, 8, 2).double())


def test_key_model() -> None:
    model = KeyModel(mean_share=0.8, num_outliers=3, outlier_std=2.0)
    vectors = model.draw(20_000, 64, generator_for(0, "keys"))
    mean, std = vectors.mean(dim=0), vectors.std(dim=0)
    outliers = std.topk(3).indices
    rms = vectors.square().sum(dim=-1).mean().sqrt()
    assert (mean.norm() / rms).item() == pytest.approx(0.8, abs=0.005)
    assert std[outliers].mean().item() == pytest.approx(2.0, rel=0.03)
    assert std.sort().values[:-3].max() < 1.03
    halves = mean[outliers].square().sort(descending=True).values
    assert (halves[1:] / halves[:-1]).tolist() == pytest.approx([0.5, 0.5], rel=0.1)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_centering(share: float) -> None:
    """Not centering multiplies the error by E|x|^2 / E|x - mean|^2 = 1 / (1 - share^2).

    Averaged over directions of the mean: the error of one of them under one rotation is its own.
    """
    generator, ratios = generator_for(0, "test"), []
    for _ in range(60):
        mean = gaussian_vectors(1, 64, generator)
        mean *= share / math.sqrt(1 - share**2) * 8 / mean.norm()  # vectors of norm 8 about it
        found = measure_centering("x", mean + gaussian_vectors(MIN_VECTORS, 64, generator))
        assert found.mean_share == pytest.approx(share, abs=0.05)
        assert found.centered_error == pytest.approx(FORMAT_ERRORS["turboquant3 key", 64], rel=0.05)
        ratios.append(found.error / found.centered_error)
    ratio = torch.tensor(ratios)
    error = ratio.std() / math.sqrt(len(ratio))
    assert abs(ratio.mean() - 1 / (1 - share**2)) < 4 * error + 2 / MIN_VECTORS


def test_generators_are_independent() -> None:
    def first(seed: int, purpose: str) -> float:
        return torch.rand(1, generator=generator_for(seed, purpose)).item()

    assert first(0, "code") == first(0, "code")
    assert len({first(seed, purpose) for seed in (-1, 0, 1, 2**70) for purpose in "ab"}) == 8


def test_report_covers_all_data_and_repeats() -> None:
    vectors = random_vectors("key-like", 300, 64, seed=3)
    report = measure_all(vectors, "keys.npy", seed=1)
    assert report == measure_all(vectors, "keys.npy", seed=1)
    assert report.mse != measure_all(vectors, "keys.npy", seed=2).mse
    assert (report.data, report.num_vectors, report.head_dim) == ("keys.npy", 300, 64)
    assert [row.data for row in report.centering] == ["keys.npy", "Gaussian", "key-like"]
    assert len(report.distances) == 15
    random = measure_all(random_vectors("Gaussian", 300, 64, seed=1), None, seed=1)
    assert [row.data for row in random.centering] == ["Gaussian", "key-like"]
    assert random.centering[0] == report.centering[1]


def test_head_dims_of_several_groups() -> None:
    """The paper's codes rotate a head as a whole, the format 128 coordinates at a time."""
    vectors = random_vectors("Gaussian", 1024, 384, seed=0)
    for code in three_bit_codes(384):
        dim = 128 if code.name.startswith("turboquant3") else 384
        assert agrees_with_theory(measure(code, vectors, seed=0), dim), code.name


def zeroed(vectors: Tensor) -> Tensor:
    return vectors.index_fill(0, torch.tensor([5, 7]), 0.0)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (torch.ones(500, 100), "does not support head_dim 100; supported: 64, 128, 256, 384, 512"),
        (torch.ones(255, 64), "255 vectors are too few .* give at least 256"),
        (torch.ones(300, 64) / torch.arange(300)[:, None], "1 of 300 vectors are not finite"),
        (zeroed(torch.randn(300, 64)), "2 of 300 vectors have coordinates .* 6.1e-05 to 65504"),
        (1e6 * torch.ones(300, 64), "300 of 300 vectors have coordinates .* rescale all"),
        (torch.ones(300, 64), "all vectors are equal .* give different ones"),
    ],
    ids=["head_dim", "few", "infinite", "zero", "huge", "equal"],
)
def test_refusals(vectors: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_all(vectors.double(), "data.npy", seed=0)
