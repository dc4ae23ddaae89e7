"""Measure what a code loses, on any vectors, beside what theory and the paper say.

Vectors are split into batches. Each batch draws its own random rotation, projection and queries; an
estimate is the mean over batches, its standard error comes from their scatter and so covers the
randomness of the code as well as that of the vectors. The format's own codes are not random: they
use its fixed diagonals in every batch.

With queries q uniform in direction, t = sqrt(d) <q, x> / (|q| |x|) and t^ the same of x^:

    squared error    E |x^ - x|^2 / |x|^2           D_mse of arXiv 2504.19874
    product error    E (t^ - t)^2                   d D_prod; has the same expectation
    bias             slope of t^ on t, minus 1      through the origin: -q is as likely as q
    variance         E (t^ - slope t)^2             product error = bias^2 + variance, as E t^2 = 1
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_turboquant.codebook import solve_codebook
from vllm_turboquant.estimate import Estimate
from vllm_turboquant.frame import plain_frame
from vllm_turboquant.layout import SlotLayout
from vllm_turboquant.paper import (
    TurboQuantMse,
    TurboQuantProd,
    gaussian_projection,
    haar_rotation,
)
from vllm_turboquant.reference import decode_keys, decode_values, encode_keys, encode_values

NUM_BATCHES = 16
NUM_QUERIES = 32  # per batch
MIN_VECTORS = 16 * NUM_BATCHES
#: |mean| / rms norm, s, from which on not centering adds a tenth to the error: 1 / (1 - s^2).
LARGE_MEAN_SHARE = 0.3

#: D_mse and d D_prod of arXiv 2504.19874 by bits, as printed. Of D_mse 0.03 and 0.009 stand for
#: 0.0345 and 0.0095; 0.047 is pi / 2 times that 0.03, where 0.0345 gives 0.054.
PUBLISHED_MSE = {1: 0.36, 2: 0.117, 3: 0.03, 4: 0.009}
PUBLISHED_PROD = {1: 1.57, 2: 0.56, 3: 0.18, 4: 0.047}

#: Reconstructs vectors [n, d] from their code.
Codec = Callable[[Tensor], Tensor]
#: Draws what is random in a code.
Draw = Callable[[torch.Generator], Codec]


@dataclass(frozen=True)
class Code:
    """A code to measure.

    Attributes:
        name: Row title; with ``bits`` it is unique.
        bits: Bits per coordinate, the sign of QJL included, norms and scales not counted.
        draw: Draws the codec of one batch.
        expected: Squared error over uniformly random rotations; None where it has no such value.
        published: The paper's number, if it has one.
    """

    name: str
    bits: int
    draw: Draw
    expected: float | None = None
    published: float | None = None


@dataclass(frozen=True)
class Fidelity:
    """What one code loses; see the top of this file.

    Attributes:
        code: Name of the code.
        bits: Bits per coordinate.
        bound: 4^-bits, the rate-distortion bound of a Gaussian source.
        expected: As in ``Code``.
        published: As in ``Code``.
    """

    code: str
    bits: int
    squared_error: Estimate
    product_error: Estimate
    bias: Estimate
    variance: Estimate
    bound: float
    expected: float | None
    published: float | None


@dataclass(frozen=True)
class DistanceFidelity:
    """How well one code keeps distances between vectors.

    Attributes:
        code: Name of the code.
        data: Name of the data.
        correlation: Pearson's, between true and reconstructed distances of disjoint pairs.
    """

    code: str
    data: str
    correlation: Estimate


@dataclass(frozen=True)
class Centering:
    """What subtracting the mean of the data before coding them as keys is worth.

    Errors are the mean of |x^ - x|^2 over that of |x - mean|^2, the part that a softmax sees.

    Attributes:
        data: Name of the data.
        mean_share: |mean| / root mean square norm, 0 to 1.
        error: Without centering.
        centered_error: With centering.
    """

    data: str
    mean_share: float
    error: float
    centered_error: float


@dataclass(frozen=True)
class Report:
    """Everything that ``measure_all`` measures.

    Attributes:
        data: Name of the vectors that ``mse``, ``prod`` and ``codes`` are measured on.
        mse: TurboQuant_mse of 1 to 4 bits.
        prod: TurboQuant_prod of 1 to 4 bits, Gaussian projection.
        codes: The format's key and value codes, and others of about as many bits.
        distances: Of Gaussian, key-like and the given vectors.
        centering: Of the same.
    """

    data: str
    head_dim: int
    num_vectors: int
    seed: int
    mse: list[Fidelity]
    prod: list[Fidelity]
    codes: list[Fidelity]
    distances: list[DistanceFidelity]
    centering: list[Centering]


@dataclass(frozen=True)
class KeyModel:
    """Random vectors that are hard for a code in the way that keys are.

    Coordinates are independent normal with standard deviation 1, except in a few outlier channels,
    which also hold the common mean, each half as much of |mean|^2 as the one before. The defaults
    resemble an average KV head of SmolLM2-135M after RoPE.

    Attributes:
        mean_share: |mean| / root mean square norm, below 1.
        num_outliers: Outlier channels.
        outlier_std: Their standard deviation.
    """

    mean_share: float = 0.75
    num_outliers: int = 4
    outlier_std: float = 2.5

    def draw(self, num_vectors: int, dim: int, generator: torch.Generator) -> Tensor:
        """Draw [num_vectors, dim] float64."""
        channels = torch.randperm(dim, generator=generator)[: self.num_outliers]
        std = torch.ones(dim, dtype=torch.float64)
        std[channels] = self.outlier_std
        weights = 0.5 ** torch.arange(self.num_outliers, dtype=torch.float64)
        odds = self.mean_share**2 / (1 - self.mean_share**2)  # |mean|^2 over the total variance
        mean = torch.zeros(dim, dtype=torch.float64)
        mean[channels] = (odds * std.square().sum() * weights / weights.sum()).sqrt()
        return mean + std * gaussian_vectors(num_vectors, dim, generator)


def gaussian_vectors(num_vectors: int, dim: int, generator: torch.Generator) -> Tensor:
    """Draw [num_vectors, dim] float64, iid standard normal."""
    return torch.randn(num_vectors, dim, generator=generator, dtype=torch.float64)


def generator_for(seed: int, purpose: str) -> torch.Generator:
    """An independent generator per purpose; one stream for two would correlate data and codes."""
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def check_shape(num_vectors: int, head_dim: int) -> None:
    """Refuse vectors that are too few or of a size that the format does not have.

    Raises:
        ValueError: In one sentence.
    """
    SlotLayout(head_dim)
    if num_vectors < MIN_VECTORS:
        raise ValueError(
            f"{num_vectors} vectors are too few to estimate errors from; "
            f"give at least {MIN_VECTORS}"
        )


def check_vectors(vectors: Tensor) -> None:
    """Refuse vectors whose numbers would mean nothing.

    Args:
        vectors: [num_vectors, head_dim].

    Raises:
        ValueError: See ``check_shape``; or not finite, beyond the format's scales or all equal.
    """
    check_shape(*vectors.shape)
    if bad := int((~vectors.isfinite().all(dim=-1)).sum()):
        raise ValueError(f"{bad} of {len(vectors)} vectors are not finite; give finite ones only")
    rms = vectors.square().mean(dim=-1).sqrt()
    half = torch.finfo(torch.float16)
    if outside := int(((rms < half.tiny) | (rms > half.max)).sum()):
        raise ValueError(
            f"{outside} of {len(vectors)} vectors have coordinates of a root mean square outside "
            f"{half.tiny:.2g} to {half.max:.5g}, the range of the format's float16 scales; "
            "leave them out or rescale all"
        )
    if (vectors == vectors[0]).all():
        raise ValueError("all vectors are equal and have no distances; give different ones")


def measure_all(vectors: Tensor, data: str | None, seed: int) -> Report:
    """Measure all codes on ``vectors``, and distances also on random ones.

    Args:
        vectors: [num_vectors, head_dim] float64, in random order.
        data: Their name; None where they are Gaussian ones themselves.
        seed: Fixes everything random.

    Raises:
        ValueError: See ``check_vectors``.
    """
    check_vectors(vectors)
    num_vectors, dim = vectors.shape
    sources = {"Gaussian": vectors}
    if data is not None:
        sources = {data: vectors, "Gaussian": random_vectors("Gaussian", num_vectors, dim, seed)}
    sources["key-like"] = random_vectors("key-like", num_vectors, dim, seed)
    return Report(
        data or "Gaussian",
        dim,
        num_vectors,
        seed,
        mse=[measure(code, vectors, seed) for code in mse_codes(dim)],
        prod=[measure(code, vectors, seed) for code in prod_codes(dim)],
        codes=[measure(code, vectors, seed) for code in three_bit_codes(dim)],
        distances=[
            DistanceFidelity(code.name, name, correlation(*pair_distances(code, source, seed)))
            for name, source in sources.items()
            for code in distance_codes(source)
        ],
        centering=[measure_centering(name, source) for name, source in sources.items()],
    )


def random_vectors(data: str, num_vectors: int, dim: int, seed: int) -> Tensor:
    """Draw [num_vectors, dim] float64 of the named kind, "Gaussian" or "key-like".

    Raises:
        ValueError: See ``check_shape``.
    """
    check_shape(num_vectors, dim)
    draw = {"Gaussian": gaussian_vectors, "key-like": KeyModel().draw}[data]
    return draw(num_vectors, dim, generator_for(seed, data))


def measure(code: Code, vectors: Tensor, seed: int) -> Fidelity:
    """Measure one code on vectors [num_vectors, d] float64, none of them 0."""
    queries_from = generator_for(seed, "queries")
    samples = []
    for x, decoded in _code_batches(code, vectors, seed):
        dim = x.shape[-1]
        queries = gaussian_vectors(NUM_QUERIES, dim, queries_from)
        directions = queries / queries.norm(dim=-1, keepdim=True)
        norm = x.norm(dim=-1, keepdim=True)
        true = dim**0.5 * (x / norm) @ directions.T
        estimated = dim**0.5 * (decoded / norm) @ directions.T
        slope = (true * estimated).sum() / true.square().sum()
        squared_error = ((decoded - x) / norm).square().sum(dim=-1).mean()
        product_error = (estimated - true).square().mean()
        variance = (estimated - slope * true).square().mean()
        samples.append(torch.stack([squared_error, product_error, slope - 1, variance]))
    squared, product, bias, spread = map(Estimate.of, torch.stack(samples).T.tolist())
    return Fidelity(
        code=code.name,
        bits=code.bits,
        squared_error=squared,
        product_error=product,
        bias=bias,
        variance=spread,
        bound=4.0**-code.bits,
        expected=code.expected,
        published=code.published,
    )


def pair_distances(code: Code, vectors: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Distances in disjoint pairs of vectors, true and between their reconstructions.

    Returns:
        Two tensors [NUM_BATCHES, pairs]; the last vectors may be left over.
    """
    pairs = len(vectors) // (2 * NUM_BATCHES)
    kept = vectors[: 2 * NUM_BATCHES * pairs]
    batches = [
        torch.stack([(part[::2] - part[1::2]).norm(dim=-1) for part in both])
        for both in _code_batches(code, kept, seed)
    ]
    true, decoded = torch.stack(batches, dim=1)
    return true, decoded


def correlation(x: Tensor, y: Tensor) -> Estimate:
    """Pearson's correlation of two [num_batches, n], its error by jackknife over the batches.

    0 where one of them is constant, as when a code cannot tell any two vectors apart.
    """
    num_batches = len(x)
    both = torch.stack([x, y])

    def pearson(batches: Tensor) -> Tensor:
        return torch.corrcoef(both[:, batches].flatten(1))[0, 1].nan_to_num(nan=0.0)

    every = torch.arange(num_batches)
    without = torch.stack([pearson(every[every != batch]) for batch in range(num_batches)])
    error = (without.var(correction=0) * (num_batches - 1)).sqrt()
    return Estimate(pearson(every).item(), error.item())


def measure_centering(data: str, vectors: Tensor) -> Centering:
    """Code vectors [num_vectors, head_dim] as keys, with and without their mean subtracted."""
    mean = vectors.mean(dim=0)
    seen = (vectors - mean).square().sum()

    def error(center: Tensor) -> float:
        return float((code_as_keys(vectors, center) - vectors).square().sum() / seen)

    share = mean.norm() / vectors.square().sum(dim=-1).mean().sqrt()
    return Centering(data, float(share), error(torch.zeros_like(mean)), error(mean))


def code_as_keys(x: Tensor, center: Tensor) -> Tensor:
    """Reconstruct [n, head_dim] from the format's key code."""
    layout = SlotLayout(x.shape[-1])
    key_frame = plain_frame(center[None])
    code = encode_keys(x[:, None], key_frame, layout)
    return decode_keys(code, key_frame, layout)[:, 0]


def code_as_values(x: Tensor) -> Tensor:
    """Reconstruct [n, head_dim] from the format's value code."""
    layout = SlotLayout(x.shape[-1])
    return decode_values(encode_values(x[:, None], layout), layout)[:, 0]


def absmax(x: Tensor, levels: int) -> Tensor:
    """Round to ``levels`` equidistant levels from -max|x| to max|x|, vector by vector."""
    largest = x.abs().amax(dim=-1, keepdim=True)
    index = ((x / largest + 1) / 2 * (levels - 1)).round()
    return (2 * index / (levels - 1) - 1) * largest


def mse_codes(dim: int) -> list[Code]:
    """TurboQuant_mse of 1 to 4 bits."""
    return [
        Code("TurboQuant_mse", bits, _mse(bits, dim), solve_codebook(bits, dim).distortion, paper)
        for bits, paper in PUBLISHED_MSE.items()
    ]


def prod_codes(dim: int) -> list[Code]:
    """TurboQuant_prod of 1 to 4 bits as published, with a Gaussian projection."""
    factor = math.pi / 2 - 1 / dim
    return [
        Code(
            "TurboQuant_prod",
            bits,
            _prod(bits, dim, gaussian_projection),
            solve_codebook(bits - 1, dim).distortion * factor,
            paper,
        )
        for bits, paper in PUBLISHED_PROD.items()
    ]


def three_bit_codes(dim: int) -> list[Code]:
    """The format's codes, and what 2 and 3 bits give without QJL, or with the paper's scales.

    Expected errors of the format's codes leave out terms of relative size 1 / group.
    """
    group = SlotLayout(dim).group
    value_loss = solve_codebook(2, group).distortion
    key_loss = value_loss * _left_by_signs(group, math.sqrt(2 / math.pi))
    two, three = (solve_codebook(bits, dim).distortion for bits in (2, 3))
    gaussian = two * (math.pi / 2 - 1 / dim)
    orthogonal = two * _left_by_signs(dim, math.sqrt(math.pi / 2))
    return [
        Code("turboquant3 key", 3, lambda _: _as_keys, key_loss / (1 - key_loss)),
        Code("QJL, orthogonal S", 3, _prod(3, dim, _orthogonal_projection), orthogonal),
        Code("QJL, Gaussian S", 3, _prod(3, dim, gaussian_projection), gaussian),
        Code("Lloyd-Max, no QJL", 3, _mse(3, dim), three),
        Code("turboquant3 value", 2, lambda _: code_as_values, value_loss / (1 - value_loss)),
        Code("Lloyd-Max, no QJL", 2, _mse(2, dim), two),
    ]


def distance_codes(vectors: Tensor) -> list[Code]:
    """Codes of 3 bits, plain and rotated; the centered one knows the mean of ``vectors``."""
    mean = vectors.mean(dim=0)
    return [
        Code("absmax, 7 levels", 3, lambda _: lambda x: absmax(x, 7)),
        Code("absmax, 8 levels", 3, lambda _: lambda x: absmax(x, 8)),
        Code("rotated, Lloyd-Max", 3, _mse(3, vectors.shape[-1])),
        Code("turboquant3 key", 3, lambda _: _as_keys),
        Code("turboquant3 key, centered", 3, lambda _: lambda x: code_as_keys(x, mean)),
    ]


def _left_by_signs(dim: int, factor: float) -> float:
    """Part of a residual's square that is left when its signs times ``factor`` are subtracted.

    E (z - factor sign(z))^2 for a coordinate z of a uniformly random vector of norm sqrt(dim).
    """
    mean_size = solve_codebook(1, dim).centroids[1]
    return 1 - 2 * factor * mean_size + factor**2


def _code_batches(code: Code, vectors: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Vectors and their reconstructions, batch by batch."""
    generator = generator_for(seed, "code")
    for batch in vectors.tensor_split(NUM_BATCHES):
        yield batch, code.draw(generator)(batch)


def _orthogonal_projection(dim: int, generator: torch.Generator) -> Tensor:
    """S for every ``dim``, where that of paper.py needs a power of two."""
    return dim**0.5 * haar_rotation(dim, generator)


def _as_keys(x: Tensor) -> Tensor:
    return code_as_keys(x, torch.zeros(x.shape[-1], dtype=x.dtype))


def _mse(bits: int, dim: int) -> Draw:
    def draw(generator: torch.Generator) -> Codec:
        quantizer = TurboQuantMse(bits, haar_rotation(dim, generator))
        return lambda x: quantizer.decode(quantizer.encode(x))

    return draw


def _prod(bits: int, dim: int, projection: Callable[[int, torch.Generator], Tensor]) -> Draw:
    def draw(generator: torch.Generator) -> Codec:
        rotation = haar_rotation(dim, generator)
        quantizer = TurboQuantProd(bits, rotation, projection(dim, generator))
        return lambda x: quantizer.decode(quantizer.encode(x))

    return draw
