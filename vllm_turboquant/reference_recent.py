"""The definition of recent tokens: which have an 8-bit copy, what is in it, and who reads it.

Attention weighs the newest tokens of a request most, so they also have a copy in 8 bits, in a small
pool. Codes in the cache stay the source of truth: a token without a copy is read from them, so a
full pool costs accuracy and nothing else.

The pool is kept in *units* of 16 tokens that start at a multiple of 16, named by where they are in
the cache: unit = slot // 16. The *window* of a request is its last ``window_units`` units. A step
goes like this:

    assign            gives every unit of a window that receives tokens a place in the pool
    store             writes codes, and copies of tokens whose unit has a place
    paged_attention   reads the copies of a request's window, and codes of everything else
    dequantize        reads every copy that is valid, and codes of everything else

``unit_map`` holds, for every unit of the cache, 0 or (place + 1) << 16 | valid, where bit o of
``valid`` says that token o of the unit has a copy. A token that is written sets its bit and clears
those behind it, so a block that changed hands never shows tokens of its former owner. Blocks that
``assign`` was not told of must not be written.

Copies, per group of d coordinates, H, D1, D3 and the frame as in ``reference.py``:

    key    x = B (k - o) as for codes,  y = H D1 x,  a = max |y|,  e = round(127 y / a)
           scale = a / 127, its sign bit set if o is the sink
    value  y = H D3 v, and the same

Rotated, a group has no outliers: its largest coordinate is 3 to 4 times the root mean square, which
makes the relative squared error about 6e-5.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from vllm_turboquant.layout import UNIT_TOKENS, SlotLayout
from vllm_turboquant.reference import (
    _join,
    _orthonormal,
    _root,
    _split,
    decode_keys,
    decode_values,
    first_visible,
    in_frame,
    load,
    out_of_frame,
    visible_tokens,
)
from vllm_turboquant.rotation import ROTATION, hadamard

LARGEST = 127.0
EVERY_TOKEN = (1 << UNIT_TOKENS) - 1


def assign(
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    block_size: int,
    window_units: int,
    step: int,
    unit_map: Tensor,
    places: Tensor,
    clock: Tensor,
) -> None:
    """Give the units that this step writes a place, and note which copies will be valid.

    Places are taken round robin from those that no window needs. Where windows need more than there
    are, the units that come last get none.

    Args:
        block_table: [num_reqs, max_blocks] int32.
        seq_lens: [num_reqs] int32, tokens of each request after this step.
        query_start_loc: [num_reqs + 1] int32; a request writes its last ``query_len`` tokens.
        block_size: Tokens of a block, a multiple of 16.
        window_units: Units of a window, 1 to 8.
        step: Counts the calls; no two calls have the same.
        unit_map: [num_blocks * block_size / 16] int32, see above; updated.
        places: [num_places, 2] int32, num_places at most 32766: the unit that has a place, -1 if
            none, and the last step whose windows needed it; updated.
        clock: [>= 3 + num_places] int32: the place to try next; the number of units in windows; how
            many of these have a place; working memory.
    """
    windows: list[list[int]] = []
    written: list[list[tuple[int, int, int]]] = []  # unit, first and last + 1 offset
    old: list[tuple[int, int]] = []  # unit, first offset
    starts = query_start_loc.tolist()
    for req, seq_len in enumerate(seq_lens.tolist()):
        units = _units(block_table[req], seq_len, block_size)
        first_of_window = max(0, len(units) - window_units)
        begin = max(0, seq_len - (starts[req + 1] - starts[req]))
        windows.append(units[first_of_window:])
        written.append([])
        for i in range(begin // UNIT_TOKENS, len(units)):
            first = max(begin - i * UNIT_TOKENS, 0)
            last = min(seq_len - i * UNIT_TOKENS, UNIT_TOKENS)
            if i < first_of_window:
                old.append((units[i], first))
            else:
                written[-1].append((units[i], first, last))
    in_windows = [unit for window in windows for unit in window]
    for unit in in_windows:
        if unit_map[unit]:
            places[(unit_map[unit] >> 16) - 1, 1] = step
    for unit, first in old:
        unit_map[unit] &= ~(EVERY_TOKEN ^ _bits(0, first))
    wanted = [unit for request in written for unit, _, _ in request if not unit_map[unit]]
    num_places = len(places)
    order = [(int(clock[0]) + i) % num_places for i in range(num_places)]
    free = [place for place in order if places[place, 1] != step]
    for unit, place in zip(wanted, free, strict=False):
        former = int(places[place, 0])
        if former >= 0 and (unit_map[former] >> 16) - 1 == place:
            unit_map[former] = 0
        unit_map[unit] = (place + 1) << 16
        places[place] = torch.tensor([unit, step])
        clock[0] = (place + 1) % num_places
    for unit, first, last in (item for request in written for item in request):
        if unit_map[unit]:
            unit_map[unit] &= ~(EVERY_TOKEN ^ _bits(0, first))
            unit_map[unit] |= _bits(first, last)
    clock[1] = len(in_windows)
    clock[2] = sum(bool(unit_map[unit]) for unit in in_windows)


def store_copies(
    key: Tensor,
    value: Tensor,
    key_frame: Tensor,
    recent: Tensor,
    unit_map: Tensor,
    slot_mapping: Tensor,
    positions: Tensor | None = None,
) -> None:
    """Write the copies of tokens whose unit has a place.

    Args:
        key: [>= num_tokens, num_kv_heads, head_dim], any floating dtype.
        value: As ``key``.
        key_frame: [num_kv_heads, 3 + num_spans, head_dim] float32.
        recent: [num_places, num_kv_heads, unit_bytes] uint8; see ``layout.SlotLayout``.
        unit_map: [num_units] int32, of this step.
        slot_mapping: [num_tokens] int64; negative ones are skipped.
        positions: [num_tokens] int64; None where the frame has no spans.
    """
    layout = SlotLayout(key.shape[-1])
    kept = (slot_mapping >= 0).nonzero()[:, 0]
    kept = kept[unit_map[slot_mapping[kept] // UNIT_TOKENS] != 0]
    unit, offset = slot_mapping[kept] // UNIT_TOKENS, slot_mapping[kept] % UNIT_TOKENS
    place = ((unit_map[unit] >> 16) - 1).long()
    arrays = recent_arrays(recent, layout)
    at = None if positions is None else positions[kept]
    from_origin, at_sink = in_frame(key[kept], key_frame, layout, at)
    for name, x, signs in (
        ("key", from_origin, ROTATION.key),
        ("value", _split(value[kept].float(), layout), ROTATION.value),
    ):
        code, scale = quantize(x, signs[: layout.group], layout)
        if name == "key":
            scale = scale.copysign(torch.where(at_sink, -1.0, 1.0).half())
        arrays[name][place, :, offset] = _join(code)
        arrays[f"{name}_scale"][place, :, :, offset] = scale


def quantize(x: Tensor, signs: Tensor, layout: SlotLayout) -> tuple[Tensor, Tensor]:
    """Rotate groups and round them to 8 bits.

    Args:
        x: [..., num_groups, group] float32.
        signs: [group], the rotation's diagonal.

    Returns:
        [..., num_groups, group] int8 and scales [..., num_groups] float16: the orthonormally
        rotated x is their product.
    """
    y = hadamard(signs * x)
    largest = y.abs().amax(dim=-1, keepdim=True)
    # NOTE: a Python number divided by a tensor would be its reciprocal's multiple, rounded twice.
    inverse = torch.where(largest == 0, 0.0, torch.full_like(largest, LARGEST) / largest)
    code = (y * inverse).round().nan_to_num(nan=0.0).clamp(-LARGEST, LARGEST)
    return code.to(torch.int8), (largest / (LARGEST * _root(layout))).half()[..., 0]


def attention_with_copies(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    key_frame: Tensor,
    scale: float,
    recent: Tensor,
    unit_map: Tensor,
    window_units: int,
    *,
    causal: bool = True,
    sliding_window: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attend to copies in the window of a request and to codes elsewhere, in float64.

    Args:
        query: [num_tokens, num_heads, head_dim].
        kv_cache: As for ``reference.attention``, as are those up to ``scale``, ``causal`` and
            ``sliding_window``.
        recent: [num_places, num_kv_heads, unit_bytes] uint8.
        unit_map: [num_units] int32.
        window_units: Units of a window.

    Returns:
        As ``reference.attention``.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = kv_cache.shape[1]
    grouped = query.double().view(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = torch.zeros_like(grouped)
    lse = torch.full(grouped.shape[:-1], -torch.inf, dtype=torch.float64)
    spans = pairwise(query_start_loc.tolist())
    for req, ((first, last), seq_len) in enumerate(zip(spans, seq_lens.tolist(), strict=True)):
        visible = visible_tokens(
            last - first, seq_len, causal=causal, sliding_window=sliding_window
        )
        if not visible.any():
            continue
        begin = first_visible(visible)
        key, value = read(
            kv_cache, block_table[req], seq_len, key_frame, recent, unit_map, window_units, begin
        )
        scores = scale * torch.einsum("qhrd,thd->qhrt", grouped[first:last], key)
        scores = scores.masked_fill(~visible[:, None, None, begin:], -torch.inf)
        lse[first:last] = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - lse[first:last, ..., None]).nan_to_num(nan=0.0)
        out[first:last] = torch.einsum("qhrt,thd->qhrd", weights, value)
    return out.reshape(query.shape), lse.reshape(num_tokens, num_heads).T


def read(
    kv_cache: Tensor,
    block_table: Tensor,
    seq_len: int,
    key_frame: Tensor,
    recent: Tensor,
    unit_map: Tensor,
    window_units: int | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Read back one sequence from copies in its window and from codes elsewhere.

    Args:
        kv_cache: As for ``reference.load``, as are ``block_table`` and ``seq_len``.
        key_frame: [num_kv_heads, 3 + num_spans, head_dim] float32.
        recent: [num_places, num_kv_heads, unit_bytes] uint8.
        unit_map: [num_units] int32.
        window_units: Units of the window; None for all, as ``ops.dequantize`` reads.
        first: First token to read.

    Returns:
        Keys and values, [seq_len - first, num_kv_heads, head_dim] float64.
    """
    layout = SlotLayout(key_frame.shape[-1])
    key_code, value_code = load(kv_cache, block_table, seq_len, layout, first)
    key = decode_keys(key_code, key_frame, layout, positions=torch.arange(first, seq_len))
    value = decode_values(value_code, layout)
    units = _units(block_table, seq_len, kv_cache.shape[2])
    arrays = recent_arrays(recent, layout)
    first_of_window = 0 if window_units is None else max(0, len(units) - window_units)
    for i in range(max(first_of_window, first // UNIT_TOKENS), len(units)):
        mapped = int(unit_map[units[i]])
        offsets = [
            o
            for o in range(UNIT_TOKENS)
            if mapped >> o & 1 and first <= i * UNIT_TOKENS + o < seq_len
        ]
        if not offsets:
            continue
        place, rows = (mapped >> 16) - 1, torch.tensor(offsets) + i * UNIT_TOKENS - first
        parts = {}
        for name, signs in (("key", ROTATION.key), ("value", ROTATION.value)):
            code = arrays[name][place][:, offsets].transpose(0, 1)
            scales = arrays[f"{name}_scale"][place][:, :, offsets].permute(2, 0, 1).double()
            y = _split(code.double(), layout) * scales.abs()[..., None]
            parts[name] = signs[: layout.group].double() * _orthonormal(y), scales.signbit()
        x, at_sink = parts["key"]
        key[rows] = out_of_frame(x, at_sink, key_frame, layout, rows + first)
        value[rows] = _join(parts["value"][0])
    return key, value


def recent_arrays(recent: Tensor, layout: SlotLayout) -> dict[str, Tensor]:
    """View the arrays of every unit's copies without copying.

    Returns:
        By name: key and value [num_places, num_kv_heads, 16, head_dim] int8; key_scale and
        value_scale [num_places, num_kv_heads, num_groups, 16] float16.
    """
    arrays = {}
    for name, section in layout.recent_sections().items():
        part = recent[:, :, section.offset_bytes : section.end_bytes]
        if name.endswith("_scale"):
            scales = part.view(torch.float16)
            arrays[name] = scales.view(*recent.shape[:2], layout.num_groups, UNIT_TOKENS)
        else:
            arrays[name] = part.view(torch.int8).view(*recent.shape[:2], UNIT_TOKENS, -1)
    return arrays


def _units(block_table: Tensor, seq_len: int, block_size: int) -> list[int]:
    """Units of a request's tokens, in order."""
    per_block = block_size // UNIT_TOKENS
    blocks = block_table.tolist()
    return [
        blocks[i // per_block] * per_block + i % per_block
        for i in range(-(-seq_len // UNIT_TOKENS))
    ]


def _bits(first: int, last: int) -> int:
    """Bits of offsets first to last - 1."""
    return (1 << last) - (1 << first)
