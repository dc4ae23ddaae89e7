"""The reference codec: its equations, identities, accuracy and edge cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.vectors import normal, seeded, split
from vllm_turboquant.codebook import solve_codebook
from vllm_turboquant.frame import BALANCE, CENTER, SINK, plain_frame
from vllm_turboquant.layout import SlotLayout
from vllm_turboquant.reference import (
    FLOAT16_MAX,
    decode_keys,
    decode_values,
    encode_keys,
    encode_values,
    tree_sum,
)
from vllm_turboquant.rotation import ROTATION, Rotation, hadamard
from vllm_turboquant.testing import random_frame

HALF_ROUNDING = 2**-11  # relative, of a normal float16
HALF_TINY = 2**-25  # absolute, of a subnormal float16
# Encoding sums d = 2^7 terms in 7 levels, four times over; 64 roundings of 2^-24 cover them.
ENCODE_ROUNDING = 2**-18
Z_999 = 3.29  # 99.9 % of a normal distribution lie within so many standard errors


def zero_frame(dim: int) -> Tensor:
    """The frame of keys of one head that are coded as they are."""
    return plain_frame(torch.zeros(1, dim))


def vector_kinds(dim: int) -> dict[str, Tensor]:
    """[dim] vectors of unlike shape."""
    j = torch.arange(dim)
    return {
        "gaussian": normal(dim, seed=1),
        "uniform": torch.rand(dim, generator=seeded(2)),
        "signs": normal(dim, seed=3).sign(),
        "constant": torch.ones(dim),
        "alternating": 1.0 - 2.0 * (j % 2),
        "decaying": 0.9 ** j.float(),
        "one-hot": (j == 5).float(),
        "two equal": ((j == 5) | (j == 9)).float(),
    }


@pytest.mark.parametrize("n", [2, 64, 128])
def test_tree_sum_order(n: int) -> None:
    """Bit for bit the first half plus the second, again and again."""
    x = [math.sin(j + 1) for j in range(n)]
    values = [torch.tensor(v, dtype=torch.float32) for v in x]
    while len(values) > 1:
        half = len(values) // 2
        values = [values[j] + values[j + half] for j in range(half)]
    got = tree_sum(torch.tensor(x, dtype=torch.float32))
    assert got.shape == (1,)
    assert got.item() == values[0].item()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_codes_follow_the_equations(head_dim: int) -> None:
    """Every code against dense float64 matrices, away from ties that float32 may break."""
    layout = SlotLayout(head_dim)
    d = layout.group
    book = solve_codebook(2, d)
    h = hadamard(torch.eye(d, dtype=torch.float64)) / math.sqrt(d)
    r1, r2, r3 = (h * signs[:d].double() for signs in vars(ROTATION).values())
    key, value = normal(50, 2, head_dim, seed=1), normal(50, 2, head_dim, seed=2)
    key_frame = random_frame(2, head_dim, seeded(3))
    center, sink, balance = key_frame.unbind(dim=1)
    key = key / balance + torch.where(torch.arange(50)[:, None, None] % 3 == 0, sink, center)
    tie = 64 * 2**-24 * math.sqrt(d)  # rounding of u and of its residual, relative to |u|

    def quantize(x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        length = x.norm(dim=-1, keepdim=True)
        u = math.sqrt(d) * x @ rotation.T / length
        centroids = torch.tensor(book.centroids, dtype=torch.float64)
        distance = (u[..., None] - centroids).abs()
        two = distance.sort(dim=-1).values
        return length, u, distance.argmin(dim=-1), two[..., 1] - two[..., 0] > tie

    from_center, from_sink = (
        split((key - origin).double() * balance.double(), layout) for origin in (center, sink)
    )
    at_sink = from_sink.norm(dim=-1) < from_center.norm(dim=-1)
    assert 0.2 < at_sink.double().mean() < 0.5
    code = encode_keys(key, key_frame, layout)
    assert torch.equal(code.at_sink, at_sink)
    x = torch.where(at_sink[..., None], from_sink, from_center)
    length, u, index, clear = quantize(x, r1)
    got_index = split(code.index, layout)
    assert clear.double().mean() > 0.99
    assert torch.equal(got_index[clear], index[clear].to(torch.uint8))
    centroid = torch.tensor(book.centroids, dtype=torch.float64)[got_index.long()]
    projected = (u - centroid) @ r2.T
    clear = projected.abs() > tie
    assert clear.double().mean() > 0.99
    sign = split(code.sign, layout)
    assert torch.equal(sign[clear], projected[clear] > 0)
    estimate = centroid + book.qjl_scale * (sign.double() * 2 - 1) @ r2
    alpha = length[..., 0] * math.sqrt(d) / (u * estimate).sum(dim=-1)
    torch.testing.assert_close(
        code.scale.double(), alpha, rtol=HALF_ROUNDING + ENCODE_ROUNDING, atol=0
    )
    decoded = alpha[..., None] * estimate @ r1 / split(balance.double(), layout)
    origin = torch.where(at_sink[..., None], split(sink, layout), split(center, layout)).double()
    error = split(decode_keys(code, key_frame, layout), layout) - origin
    assert (error - decoded).norm() <= (HALF_ROUNDING + ENCODE_ROUNDING) * decoded.norm()

    length, u, index, clear = quantize(split(value.double(), layout), r3)
    value_code = encode_values(value, layout)
    got_index = split(value_code.index, layout)
    assert torch.equal(got_index[clear], index[clear].to(torch.uint8))
    centroid = torch.tensor(book.centroids, dtype=torch.float64)[got_index.long()]
    beta = length[..., 0] * math.sqrt(d) / (u * centroid).sum(dim=-1)
    torch.testing.assert_close(
        value_code.scale.double(), beta, rtol=HALF_ROUNDING + ENCODE_ROUNDING, atol=0
    )
    decoded = beta[..., None] * centroid @ r3
    error = split(decode_values(value_code, layout), layout) - decoded
    assert error.norm() <= (HALF_ROUNDING + ENCODE_ROUNDING) * decoded.norm()


def assert_overlap(x: Tensor, decoded: Tensor, layout: SlotLayout) -> None:
    """<x, x^> = |x|^2 group by group, up to the rounding of the stored scale."""
    x, decoded = split(x.double(), layout), split(decoded, layout)
    square = (x * x).sum(dim=-1)
    assert square.min() > 0
    overlap = (x * decoded).sum(dim=-1)
    relative = (overlap / square - 1).abs().max().item()
    assert relative <= HALF_ROUNDING + ENCODE_ROUNDING


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_scale_makes_overlap_exact(head_dim: int) -> None:
    layout = SlotLayout(head_dim)
    kinds = torch.stack(list(vector_kinds(head_dim // layout.num_groups).values()))
    x = torch.cat([kinds.repeat(1, layout.num_groups), normal(500, head_dim)])[:, None]
    as_they_are = zero_frame(head_dim)
    decoded = decode_keys(encode_keys(x, as_they_are, layout), as_they_are, layout)
    assert_overlap(x, decoded, layout)
    key_frame = random_frame(1, head_dim, seeded(9))
    balance = key_frame[:, BALANCE]
    for row in (CENTER, SINK):
        origin = key_frame[:, row]
        key = 0.1 * x / balance + origin  # too close to its origin to start from the other
        code = encode_keys(key, key_frame, layout)
        assert (code.at_sink == (row == SINK)).all()
        decoded = decode_keys(code, key_frame, layout)
        stretched = (key - origin) * balance  # as encode_keys rounds it
        assert_overlap(stretched, (decoded - origin.double()) * balance.double(), layout)
    assert_overlap(x, decode_values(encode_values(x, layout), layout), layout)


def adversarial(dim: int) -> st.SearchStrategy[list[float]]:
    """Vectors whose rotated coordinates are far from normal."""
    levels = st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0])
    coordinate = st.floats(-1, 1, width=32)
    sparse = st.dictionaries(st.integers(0, dim - 1), coordinate, min_size=1, max_size=4).map(
        lambda d: [d.get(j, 0.0) for j in range(dim)]
    )
    periodic = st.lists(levels, min_size=1, max_size=8).map(
        lambda p: (p * dim)[:dim]  # constant and alternating vectors, and Walsh functions
    )
    dense = st.lists(coordinate, min_size=dim, max_size=dim)
    return st.one_of(sparse, periodic, dense)


@pytest.mark.parametrize("head_dim", [64, 128])
@settings(max_examples=120)
@given(data=st.data())
def test_adversarial_vectors(head_dim: int, data: st.DataObject) -> None:
    """The scale stays positive and finite, so <u, u^> is positive, whatever the direction."""
    layout = SlotLayout(head_dim)
    values = torch.tensor(data.draw(adversarial(head_dim)))
    amplitude = data.draw(st.sampled_from([1e-2, 1.0, 1e3]))
    rotated_back = hadamard(values) * ROTATION.key[:head_dim]  # its rotation is ``values`` again
    for x in (values, rotated_back):
        if x.norm() < 1e-3:
            continue  # its square underflows, or the scale is a subnormal float16
        x = (x / x.norm() * amplitude)[None, None]
        key_frame = zero_frame(head_dim)
        key, value = encode_keys(x, key_frame, layout), encode_values(x, layout)
        for scale in (key.scale, value.scale):
            assert scale.isfinite().all()
            assert (scale > 0).all()
        assert_overlap(x, decode_keys(key, key_frame, layout), layout)
        assert_overlap(x, decode_values(value, layout), layout)


@pytest.mark.parametrize("head_dim", [64, 256])
def test_zero_vectors(head_dim: int) -> None:
    """A key that equals the center or the sink, and a zero value, come back exactly."""
    layout = SlotLayout(head_dim)
    key_frame = random_frame(2, head_dim, seeded(0))
    center, sink, _ = key_frame.unbind(dim=1)
    key, value = torch.stack([center, sink, center]), torch.zeros(3, 2, head_dim)
    key_code, value_code = encode_keys(key, key_frame, layout), encode_values(value, layout)
    assert (key_code.scale == 0).all()
    assert (value_code.scale == 0).all()
    assert torch.equal(decode_keys(key_code, key_frame, layout), key.double())
    assert torch.equal(decode_values(value_code, layout), value.double())


def test_ties() -> None:
    """u = 0 lies on the middle boundary and takes the lower level; a projection of 0 is positive.

    For a key that equals the center, u = 0 and the residual is one positive constant, which the
    Hadamard matrix without signs sends to 0 everywhere but in its first coordinate.
    """
    center = normal(1, 128)
    rotation = Rotation(ROTATION.key, torch.ones(128), ROTATION.value)
    code = encode_keys(center[None], plain_frame(center), SlotLayout(128), rotation)
    assert (code.index == 1).all()
    assert code.sign.all()


@pytest.mark.parametrize("exponent", range(4, 31, 2))
def test_huge_vectors_stay_finite(exponent: int) -> None:
    layout = SlotLayout(128)
    x = normal(20, 1, 128) * 10.0**exponent
    key_frame = zero_frame(128)
    key, value = encode_keys(x, key_frame, layout), encode_values(x, layout)
    for scale in (key.scale, value.scale):
        assert scale.isfinite().all()
        if exponent > 5:  # the float16 scale saturates
            assert (scale == FLOAT16_MAX).all()
    assert decode_keys(key, key_frame, layout).isfinite().all()
    assert decode_values(value, layout).isfinite().all()


@pytest.mark.parametrize("exponent", range(-45, -3, 3))
def test_tiny_vectors_stay_finite(exponent: int) -> None:
    """Below the normal float16 numbers the scale loses bits, then becomes 0, and nothing else."""
    layout = SlotLayout(128)
    x = (normal(20, 1, 128).double() * 10.0**exponent).float()
    code = encode_values(x, layout)
    assert code.scale.isfinite().all()
    square = (x.double() ** 2).sum(dim=-1)
    overlap = (x.double() * decode_values(code, layout)).sum(dim=-1)
    # A scale that is off by s moves <x, x^> by at most s |x| |C|, and |C| <= 1.51 sqrt(d).
    allowed = HALF_TINY * 1.51 * math.sqrt(128) * square.sqrt()
    assert ((overlap - square).abs() <= 2 * HALF_ROUNDING * square + allowed).all()


def test_two_groups_are_coded_alone() -> None:
    """A head of 256 holds the bytes of two heads of 128."""
    whole, half = SlotLayout(256), SlotLayout(128)
    key, value = normal(30, 3, 256), normal(30, 3, 256, seed=1)
    key_frame = random_frame(3, 256, seeded(2))
    code, value_code = encode_keys(key, key_frame, whole), encode_values(value, whole)
    assert (code.at_sink[..., 0] != code.at_sink[..., 1]).any()
    for group in range(2):
        part = slice(128 * group, 128 * (group + 1))
        alone = encode_keys(key[..., part], key_frame[..., part], half)
        assert torch.equal(code.index[..., part], alone.index)
        assert torch.equal(code.sign[..., part], alone.sign)
        assert torch.equal(code.scale[..., group], alone.scale[..., 0])
        assert torch.equal(code.at_sink[..., group], alone.at_sink[..., 0])
        value_alone = encode_values(value[..., part], half)
        assert torch.equal(value_code.index[..., part], value_alone.index)
        assert torch.equal(value_code.scale[..., group], value_alone.scale[..., 0])


def test_wrong_head_dim_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected head_dim 128, got shape \(3, 1, 64\)"):
        encode_keys(torch.zeros(3, 1, 64), zero_frame(64), SlotLayout(128))


def assert_mean(sample: Tensor, expected: float, dropped: float) -> None:
    """The mean is within its 99.9 % interval of ``expected``, which is known up to ``dropped``."""
    error = (sample.std() / math.sqrt(len(sample))).item()
    assert abs(sample.mean().item() - expected) <= Z_999 * error + dropped


@pytest.mark.parametrize(("dim", "measured"), [(64, 0.0424), (128, 0.0435)])
def test_key_distortion(dim: int, measured: float) -> None:
    """E|x - x^|^2 / |x|^2 = D' / (1 - D') with D' = D - 2 rho sqrt(D) c1 + rho^2.

    D' is what the signs leave of the distortion D: S r is nearly normal with variance D, and
    E|z| = sqrt(D) c1 with c1 the 1-bit centroid. With <u, u^> = |u^|^2 = d (1 - D') to first order,
    the scale that makes <x, x^> = |x|^2 divides by 1 - D'.
    """
    layout = SlotLayout(dim)
    book, c1 = solve_codebook(2, dim), solve_codebook(1, dim).centroids[1]
    rho = book.qjl_scale
    left = book.distortion - 2 * rho * math.sqrt(book.distortion) * c1 + rho**2
    x, key_frame = normal(20_000, 1, dim), zero_frame(dim)
    decoded = decode_keys(encode_keys(x, key_frame, layout), key_frame, layout, dtype=torch.float32)
    relative = ((decoded - x).norm(dim=-1) / x.norm(dim=-1)).square()[:, 0]
    expected = left / (1 - left)
    assert_mean(relative, expected, dropped=expected / dim)  # terms of relative size 1 / d
    assert_mean(relative, measured, dropped=5e-5)  # ten times as many vectors, rounded


@pytest.mark.parametrize(("dim", "measured"), [(64, 0.1281), (128, 0.1305)])
def test_value_distortion(dim: int, measured: float) -> None:
    """E|v - v^|^2 / |v|^2 = D / (1 - D): the distortion, scaled up with the reconstruction."""
    layout = SlotLayout(dim)
    distortion = solve_codebook(2, dim).distortion
    x = normal(20_000, 1, dim)
    decoded = decode_values(encode_values(x, layout), layout, dtype=torch.float32)
    relative = ((decoded - x).norm(dim=-1) / x.norm(dim=-1)).square()[:, 0]
    expected = distortion / (1 - distortion)
    assert_mean(relative, expected, dropped=expected / dim)  # terms of relative size 1 / d
    assert_mean(relative, measured, dropped=5e-5)  # ten times as many vectors, rounded


@pytest.mark.parametrize("dim", [64, 128])
def test_inner_products_are_unbiased_over_random_diagonals(dim: int) -> None:
    """Mean of <q, x^> - <q, x> within its 99.9 % interval for every kind of vector.

    Sign diagonals are fewer rotations than all of them. Vectors with one dominant coordinate and a
    smaller rest are therefore not in the list: their rotated coordinates cluster at +-1, next to a
    boundary of the codebook, and the rest comes back too large.
    """
    layout, num_rotations = SlotLayout(dim), 1000
    kinds = vector_kinds(dim)
    x = torch.stack(list(kinds.values()))
    x = (x / x.norm(dim=-1, keepdim=True))[:, None]
    query = normal(len(kinds), 1, dim, seed=4)
    key_frame = zero_frame(dim)
    generator = seeded(5)
    errors = []
    for _ in range(num_rotations):
        rotation = Rotation.random(dim, generator)
        code = encode_keys(x, key_frame, layout, rotation)
        decoded = decode_keys(code, key_frame, layout, rotation, dtype=torch.float32)
        errors.append((query * (decoded - x)).sum(dim=-1)[:, 0])
    error = torch.stack(errors)
    score = error.mean(dim=0) / (error.std(dim=0) / math.sqrt(num_rotations))
    assert score.abs().max() < Z_999, dict(zip(kinds, score.tolist(), strict=True))


@pytest.mark.parametrize("cosine", [0.0, 0.5, -0.9])
@pytest.mark.parametrize("dim", [64, 128])
def test_inner_products_are_unbiased_over_all_rotations(dim: int, cosine: float) -> None:
    """With a uniform rotation in front, by symmetry, the estimate is unbiased for every vector.

    Only the images of x and q matter, and those of unit vectors are any orthonormal pair (e, f):
    x = e and q = cos e + sin f.
    """
    layout, key_frame = SlotLayout(dim), zero_frame(dim)
    e, g = normal(20_000, 1, dim, seed=6), normal(20_000, 1, dim, seed=7)
    e = e / e.norm(dim=-1, keepdim=True)
    f = g - (g * e).sum(dim=-1, keepdim=True) * e
    query = cosine * e + math.sqrt(1 - cosine**2) * f / f.norm(dim=-1, keepdim=True)
    decoded = decode_keys(encode_keys(e, key_frame, layout), key_frame, layout)
    assert_mean((query * (decoded - e)).sum(dim=-1)[:, 0], 0.0, dropped=0.0)
