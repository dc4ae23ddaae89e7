"""The definition of turboquant3 in plain PyTorch: encode, decode, pack, attend.

Per group of d coordinates (H the orthonormal Hadamard matrix; D1, D2, D3 fixed +-1 diagonals; C the
2-bit codebook; center c, sink e and balance B, a diagonal, make up the frame of the KV head):

    key    o = c or e, whichever makes |B (k - o)| smaller; c if they are equal. Where the frame has
           centers of spans, c is that of the key's position
           x = B (k - o),    u = sqrt(d) H D1 x / |x|     rotate, normalize
           i = argmin_j |u - C[j]|,    r = u - C[i]       2-bit Lloyd-Max index
           s = sign(H D2 r),    u^ = C[i] + rho (H D2)^T s    1-bit QJL of the residual
           alpha = |x| / sqrt(d) * <u, u> / <u, u^>       so that <x, x^> = |x|^2
    value  u = sqrt(d) H D3 v / |v|,  i as above,  beta = |v| / sqrt(d) * <u, u> / <u, C[i]>
    score  <q, k^> = alpha (<q1, C[i]> + rho <q2, s>) + <q, o>,  q1 = H D1 B^-1 q,  q2 = H D2 q1
    output (H D3)^T sum_t p_t beta_t C[i_t]

The sign bit of the stored alpha, which is never negative, says that o is the sink.

Source: arXiv 2504.19874, Alg. 2 (TurboQuant_prod). It departs from the paper in two points: S = H
D2 is orthogonal and not Gaussian (as in the experiments of arXiv 2406.03482, section 4.1), with rho
the least-squares and not the unbiased factor of the signs; and one scale per vector, such that
<x, x^> = |x|^2, replaces the two norms. Keys are put into a frame first; see ``frame.py``.

The inner product with any vector is unbiased over Haar-random rotations. The fast rotation, one
Hadamard matrix with random signs, comes close to that unless a few coordinates of a vector outweigh
all others together.

Encoding is defined in float32 and in this order of operations, so that every kernel can produce the
same bytes; ``tree_sum`` and ``hadamard`` fix the order of additions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_turboquant.codebook import Codebook, solve_codebook
from vllm_turboquant.frame import BALANCE, SINK, near_origins
from vllm_turboquant.layout import SlotLayout
from vllm_turboquant.reference_blocks import block_arrays, pack_bits, unpack_bits
from vllm_turboquant.rotation import ROTATION, Rotation, hadamard

FLOAT16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class KeyCode:
    """Codes of keys.

    Attributes:
        index: [..., head_dim] uint8 in 0..3.
        sign: [..., head_dim] bool, True = +1.
        scale: [..., num_groups] float16, alpha, unit of the key; 0 where the key equals its origin.
        at_sink: [..., num_groups] bool, True where that is the sink.
    """

    index: Tensor
    sign: Tensor
    scale: Tensor
    at_sink: Tensor


@dataclass(frozen=True)
class ValueCode:
    """Codes of values.

    Attributes:
        index: [..., head_dim] uint8 in 0..3.
        scale: [..., num_groups] float16, beta, unit of the value; 0 where the value is 0.
    """

    index: Tensor
    scale: Tensor


def codebook(layout: SlotLayout) -> Codebook:
    """The codebook of the format for ``layout``."""
    return solve_codebook(SlotLayout.index_bits, layout.group)


def tree_sum(x: Tensor) -> Tensor:
    """Sum the last axis by halving: element j plus element j + n / 2, until one is left.

    Args:
        x: [..., n], n a power of two.

    Returns:
        [..., 1].
    """
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x


def encode_keys(
    key: Tensor,
    key_frame: Tensor,
    layout: SlotLayout,
    rotation: Rotation = ROTATION,
    positions: Tensor | None = None,
) -> KeyCode:
    """Code post-RoPE keys as 2-bit indices, 1-bit residual signs and one float16 scale per group.

    Args:
        key: [..., num_kv_heads, head_dim], any floating dtype.
        key_frame: [num_kv_heads, 3 + num_spans, head_dim] float32; see ``frame.make_frame``.
        layout: Fixes head_dim and the group.
        rotation: The format's own unless averaging over rotations.
        positions: [num_tokens] integer, where ``key`` is [num_tokens, num_kv_heads, head_dim]; None
            where the frame has no spans.

    Returns:
        KeyCode with the leading axes of ``key``.

    Raises:
        ValueError: The last axis of ``key`` is not ``layout.head_dim``.
    """
    book = codebook(layout)
    root = _root(layout)
    rho = torch.tensor(book.qjl_scale, dtype=torch.float64)
    x, at_sink = in_frame(key, key_frame, layout, positions)
    norm, u, index, centroid = _quantize(x, rotation.key[: layout.group], book)
    residual_signs = rotation.residual[: layout.group]
    sign = hadamard(residual_signs * (u - centroid)) >= 0
    projected = hadamard(residual_signs * u)  # sqrt(d) H D2 u
    agreement = tree_sum(torch.where(sign, projected, -projected))
    overlap = tree_sum(u * centroid) + (rho / layout.group**0.5).float() * agreement  # <u, u^>
    return KeyCode(_join(index), _join(sign), _scale(norm * root, overlap), at_sink)


def in_frame(
    key: Tensor, key_frame: Tensor, layout: SlotLayout, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Keys as seen from their origins.

    Returns:
        x [..., num_groups, group] float32 and whether it is seen from the sink [..., num_groups].
    """
    near, far = (
        _split((key.float() - origin) * key_frame[:, BALANCE], layout)
        for origin in (near_origins(key_frame, positions), key_frame[:, SINK])
    )
    at_sink = tree_sum(far * far) < tree_sum(near * near)
    return torch.where(at_sink, far, near), at_sink[..., 0]


def out_of_frame(
    x: Tensor, at_sink: Tensor, key_frame: Tensor, layout: SlotLayout, positions: Tensor | None
) -> Tensor:
    """Undo ``in_frame``; in the dtype of ``x``.

    Returns:
        [..., num_kv_heads, head_dim].
    """
    key_frame = key_frame.to(x.dtype)
    near, sink, balance = (
        _split(part, layout)
        for part in (
            near_origins(key_frame, positions),
            key_frame[:, SINK],
            key_frame[:, BALANCE],
        )
    )
    return _join(x / balance + torch.where(at_sink[..., None], sink, near))


def encode_values(value: Tensor, layout: SlotLayout, rotation: Rotation = ROTATION) -> ValueCode:
    """Code values as 2-bit indices and one float16 scale per group.

    Args:
        value: [..., num_kv_heads, head_dim], any floating dtype.
        layout: Fixes head_dim and the group.
        rotation: The format's own unless averaging over rotations.

    Returns:
        ValueCode with the leading axes of ``value``.

    Raises:
        ValueError: The last axis of ``value`` is not ``layout.head_dim``.
    """
    book = codebook(layout)
    x = _split(value.float(), layout)
    norm, u, index, centroid = _quantize(x, rotation.value[: layout.group], book)
    return ValueCode(_join(index), _scale(norm * _root(layout), tree_sum(u * centroid)))


def rotate_query(
    query: Tensor, layout: SlotLayout, rotation: Rotation = ROTATION
) -> tuple[Tensor, Tensor]:
    """Rotate queries into the two spaces that keys are coded in.

    Args:
        query: [..., head_dim] floating dtype, divided by the balance; the arithmetic is done in it.

    Returns:
        q1 = H D1 q and q2 = H D2 q1, each [..., head_dim].
    """
    q1 = _orthonormal(_split(query, layout) * rotation.key[: layout.group].to(query.dtype))
    q2 = _orthonormal(q1 * rotation.residual[: layout.group].to(query.dtype))
    return _join(q1), _join(q2)


def decode_keys(
    code: KeyCode,
    key_frame: Tensor,
    layout: SlotLayout,
    rotation: Rotation = ROTATION,
    dtype: torch.dtype = torch.float64,
    positions: Tensor | None = None,
) -> Tensor:
    """Reconstruct keys; ``positions`` as in ``encode_keys``.

    Returns:
        [..., num_kv_heads, head_dim] in ``dtype``.
    """
    d1 = rotation.key[: layout.group].to(dtype)
    d2 = rotation.residual[: layout.group].to(dtype)
    sign = _split(code.sign, layout).to(dtype) * 2 - 1
    u = _centroids(code.index, layout, dtype) + codebook(layout).qjl_scale * d2 * _orthonormal(sign)
    x = code.scale.to(dtype)[..., None] * d1 * _orthonormal(u)
    return out_of_frame(x, code.at_sink, key_frame, layout, positions)


def decode_values(
    code: ValueCode,
    layout: SlotLayout,
    rotation: Rotation = ROTATION,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Reconstruct values.

    Returns:
        [..., num_kv_heads, head_dim] in ``dtype``.
    """
    d3 = rotation.value[: layout.group].to(dtype)
    u = _centroids(code.index, layout, dtype)
    return _join(code.scale.to(dtype)[..., None] * d3 * _orthonormal(u))


def store(
    key: Tensor,
    value: Tensor,
    key_frame: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    positions: Tensor | None = None,
) -> None:
    """Encode tokens and write their slots in place.

    Args:
        key: [>= num_tokens, num_kv_heads, head_dim], any floating dtype; rows past num_tokens are
            ignored.
        value: As ``key``.
        key_frame: [num_kv_heads, 3 + num_spans, head_dim] float32.
        kv_cache: [num_blocks, num_kv_heads, block_size, slot_bytes] uint8.
        slot_mapping: [num_tokens] int64, block * block_size + offset in block; negative ones are
            skipped.
        positions: [num_tokens] int64, which token of its request each is; None where the frame has
            no spans.
    """
    layout = SlotLayout(key.shape[-1])
    block_size = kv_cache.shape[2]
    kept = (slot_mapping >= 0).nonzero()[:, 0]
    slots = slot_mapping[kept]
    block, offset = slots // block_size, slots % block_size
    at = None if positions is None else positions[kept]
    key_code = encode_keys(key[kept], key_frame, layout, positions=at)
    value_code = encode_values(value[kept], layout)
    arrays = block_arrays(kv_cache, layout)
    arrays["key_index"][block, :, offset] = pack_bits(key_code.index, 2)
    arrays["key_sign"][block, :, offset] = pack_bits(key_code.sign, 1)
    arrays["value_index"][block, :, offset] = pack_bits(value_code.index, 2)
    origin = torch.where(key_code.at_sink, -1.0, 1.0).half()
    arrays["key_scale"][block, :, :, offset] = key_code.scale.copysign(origin)  # also of 0 and NaN
    arrays["value_scale"][block, :, :, offset] = value_code.scale


def load(
    kv_cache: Tensor, block_table: Tensor, seq_len: int, layout: SlotLayout, first: int = 0
) -> tuple[KeyCode, ValueCode]:
    """Read back the codes of one sequence.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, slot_bytes] uint8.
        block_table: [>= ceil(seq_len / block_size)] integer block ids.
        seq_len: Tokens of the sequence.
        first: First token to read.

    Returns:
        Codes with leading axes [seq_len - first, num_kv_heads].
    """
    block_size = kv_cache.shape[2]
    position = torch.arange(first, seq_len)
    block, offset = block_table[position // block_size].long(), position % block_size
    arrays = block_arrays(kv_cache, layout)
    key_scale = arrays["key_scale"][block, :, :, offset]
    return (
        KeyCode(
            unpack_bits(arrays["key_index"][block, :, offset], 2),
            unpack_bits(arrays["key_sign"][block, :, offset], 1).bool(),
            key_scale.abs(),
            key_scale.signbit(),
        ),
        ValueCode(
            unpack_bits(arrays["value_index"][block, :, offset], 2),
            arrays["value_scale"][block, :, :, offset],
        ),
    )


def visible_tokens(
    num_rows: int, seq_len: int, *, causal: bool = True, sliding_window: int = 0
) -> Tensor:
    """Which cached tokens the query rows of a request see.

    With ``causal``, the rows are the last of the request's ``seq_len`` tokens; otherwise, they come
    right after these. The row at position p sees tokens up to p, of these the last
    ``sliding_window``: p - sliding_window + 1 to p.

    Args:
        num_rows: Query rows.
        seq_len: Cached tokens.
        causal: See above.
        sliding_window: 0 for no window.

    Returns:
        [num_rows, seq_len] bool.
    """
    position = seq_len + torch.arange(num_rows)[:, None] - (num_rows if causal else 0)
    token = torch.arange(seq_len)
    visible = token <= position
    return visible & (token > position - sliding_window) if sliding_window else visible


def first_visible(visible: Tensor) -> int:
    """The first token that any row sees: [num_rows, seq_len] bool, not all False."""
    return int(visible.any(dim=0).nonzero()[0])


def attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    key_frame: Tensor,
    scale: float,
    *,
    causal: bool = True,
    sliding_window: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Attend to codes, without ever rotating a key or a value.

    Args:
        query: [num_tokens, num_heads, head_dim].
        kv_cache: [num_blocks, num_kv_heads, block_size, slot_bytes] uint8.
        block_table: [num_reqs, max_blocks] integer; entries past a request's blocks are not read,
            nor those of blocks that no row sees.
        seq_lens: [num_reqs] integer, cached tokens to attend to; 0 is allowed.
        query_start_loc: [num_reqs + 1] integer, first query row of each request.
        key_frame: [num_kv_heads, 3 + num_spans, head_dim] float32.
        scale: Softmax scale.
        causal: The last query row of a request sees all its seq_len tokens, the one before it one
            token less, and so on; otherwise every row sees all.
        sliding_window: How many tokens, its own included, a row sees at most; 0 for no limit. See
            ``visible_tokens``, also for rows that are not causal.
        dtype: Precision of the arithmetic.

    Returns:
        Output [num_tokens, num_heads, head_dim], 0 for a row that sees nothing, and the natural
        log-sum-exp of the scaled scores [num_heads, num_tokens], -inf for such a row; both in
        ``dtype``.
    """
    layout = SlotLayout(query.shape[-1])
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = kv_cache.shape[1]
    grouped = query.to(dtype).view(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = torch.zeros_like(grouped)
    lse = torch.full(grouped.shape[:-1], -torch.inf, dtype=dtype)
    starts = query_start_loc.tolist()
    for req, seq_len in enumerate(seq_lens.tolist()):
        first, last = starts[req], starts[req + 1]
        visible = visible_tokens(
            last - first, seq_len, causal=causal, sliding_window=sliding_window
        )
        if not visible.any():
            continue
        begin = first_visible(visible)
        key, value = load(kv_cache, block_table[req], seq_len, layout, begin)
        positions = torch.arange(begin, seq_len)
        scores = scale * score_codes(grouped[first:last], key, key_frame, layout, positions)
        scores = scores.masked_fill(~visible[:, None, None, begin:], -torch.inf)
        lse[first:last] = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - lse[first:last, ..., None])
        sees_nothing = lse[first:last] == -torch.inf
        weights = weights.masked_fill(sees_nothing[..., None], 0.0)  # -inf - -inf is NaN
        weighted = torch.einsum(
            "qhrt,thgd->qhrgd",
            weights,
            _centroids(value.index, layout, dtype) * value.scale.to(dtype)[..., None],
        )
        signs = ROTATION.value[: layout.group].to(dtype)
        out[first:last] = _join(signs * _orthonormal(weighted))
    return out.reshape(query.shape), lse.reshape(num_tokens, num_heads).T


def score_codes(
    query: Tensor,
    code: KeyCode,
    key_frame: Tensor,
    layout: SlotLayout,
    positions: Tensor | None = None,
) -> Tensor:
    """Inner products of queries with coded keys, unscaled.

    Args:
        query: [num_tokens, num_kv_heads, group_size, head_dim]; the arithmetic is done in its
            dtype.
        code: Codes of [seq_len, num_kv_heads] keys.
        key_frame: [num_kv_heads, 3 + num_spans, head_dim] float32.
        positions: [seq_len] integer; None where the frame has no spans.

    Returns:
        [num_tokens, num_kv_heads, group_size, seq_len].
    """
    key_frame = key_frame.to(query.dtype)
    q1, q2 = rotate_query(query / key_frame[:, BALANCE, None], layout)
    centroid = _centroids(code.index, layout, query.dtype)
    sign = _split(code.sign, layout).to(query.dtype) * 2 - 1
    per_group = torch.einsum("qhrgd,thgd->qhrgt", _split(q1, layout), centroid)
    per_group += codebook(layout).qjl_scale * torch.einsum(
        "qhrgd,thgd->qhrgt", _split(q2, layout), sign
    )
    per_group *= code.scale.to(query.dtype).permute(1, 2, 0)[None, :, None]
    near, at_sink = (
        torch.einsum("qhrgd,thgd->qhrgt", _split(query, layout), _split(origins, layout))
        for origins in (
            near_origins(key_frame, positions).expand(*code.index.shape),
            key_frame[None, :, SINK],
        )
    )
    per_group += torch.where(code.at_sink.permute(1, 2, 0)[None, :, None], at_sink, near)
    return per_group.sum(dim=-2)


def _split(x: Tensor, layout: SlotLayout) -> Tensor:
    """[..., head_dim] to [..., num_groups, group]."""
    if x.shape[-1] != layout.head_dim:
        raise ValueError(f"expected head_dim {layout.head_dim}, got shape {tuple(x.shape)}")
    return x.reshape(*x.shape[:-1], layout.num_groups, layout.group)


def _join(x: Tensor) -> Tensor:
    """[..., num_groups, group] to [..., head_dim]."""
    return x.flatten(-2)


def _orthonormal(x: Tensor) -> Tensor:
    return hadamard(x) / x.shape[-1] ** 0.5


def _root(layout: SlotLayout) -> Tensor:
    return torch.tensor(layout.group**0.5, dtype=torch.float64).float()


def _quantize(x: Tensor, signs: Tensor, book: Codebook) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotate and normalize [..., group]; return the norm [..., 1], u, its indices and centroids."""
    # NOTE: torch.sqrt is not correctly rounded in float32; kernels are.
    norm = tree_sum(x * x).double().sqrt().float()
    # hadamard() is sqrt(d) times orthonormal: exactly the factor that makes u have unit variance.
    u = hadamard(signs * x) * torch.where(norm > 0, 1 / norm, 0.0)
    index = torch.zeros_like(u, dtype=torch.uint8)
    for boundary in book.boundaries:
        index += u > torch.tensor(boundary, dtype=torch.float64).float()
    centroids = torch.tensor(book.centroids, dtype=torch.float64).float()
    return norm, u, index, centroids[index.long()]


def _scale(length: Tensor, overlap: Tensor) -> Tensor:
    """|x| / sqrt(d) * <u, u> / <u, u^> with <u, u> = d; saturates where float16 ends."""
    scale = torch.where(length == 0, 0.0, length / overlap)  # not 0 / 0
    return scale.clamp(max=FLOAT16_MAX).half()[..., 0]


def _centroids(index: Tensor, layout: SlotLayout, dtype: torch.dtype) -> Tensor:
    """[..., head_dim] indices to [..., num_groups, group] centroids, as rounded to float32."""
    centroids = torch.tensor(codebook(layout).centroids, dtype=torch.float64).float().to(dtype)
    return centroids[_split(index, layout).long()]
