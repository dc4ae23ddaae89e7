"""The paged dequantize kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from tests.test_attention import with_random_origins
from tests.test_recent import dequantize, with_copies
from vllm_turboquant import ops, reference
from vllm_turboquant.frame import SINK, near_origins
from vllm_turboquant.layout import SlotLayout
from vllm_turboquant.testing import assert_close, make_batch

UNTOUCHED = 7.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("head_dim", "block_size"), [(64, 16), (64, 128), (128, 48), (256, 16), (512, 32)]
)
def test_ranges_of_tokens(head_dim: int, block_size: int, dtype: torch.dtype) -> None:
    layout = SlotLayout(head_dim)
    batch = make_batch((530, 0, 77, 1100), (1,) * 4, 4, 2, head_dim, block_size)
    batch = with_random_origins(batch)
    first, last = (485, 0, 16, 1000), (520, 0, 77, 1090)
    lengths = [b - a for a, b in zip(first, last, strict=True)]
    cu_seq_lens = torch.tensor([0, *lengths]).cumsum(0).int()
    rows = int(cu_seq_lens[-1])
    got_key, got_value = torch.full((2, rows + 2, 2, head_dim), UNTOUCHED, dtype=dtype)
    ops.dequantize(
        batch.kv_cache,
        batch.block_table,
        torch.tensor(first, dtype=torch.int32),
        cu_seq_lens,
        batch.key_frame,
        got_key,
        got_value,
    )
    want_key, want_value = [], []
    for req, (a, b) in enumerate(zip(first, last, strict=True)):
        key_code, value_code = reference.load(batch.kv_cache, batch.block_table[req], b, layout)
        positions = torch.arange(b)
        key = reference.decode_keys(key_code, batch.key_frame, layout, positions=positions)
        want_key.append(key[a:])
        want_value.append(reference.decode_values(value_code, layout)[a:])
    rounding = max(torch.finfo(dtype).eps, 1e-6)
    assert_close(got_key[:rows], torch.cat(want_key), rounding, "keys")
    assert_close(got_value[:rows], torch.cat(want_value), rounding, "values")
    assert (got_key[rows:] == UNTOUCHED).all() and (got_value[rows:] == UNTOUCHED).all()


@pytest.mark.parametrize("num_spans", [0, 1, 3])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_keys_that_equal_an_origin_come_back_exactly(head_dim: int, num_spans: int) -> None:
    batch = make_batch((1100,), (1,), 4, 2, head_dim, num_spans=num_spans)
    at_sink = (torch.arange(1100) % 3 == 0)[:, None, None]
    near = near_origins(batch.key_frame, batch.positions)
    want = torch.where(at_sink, batch.key_frame[:, SINK], near)
    ops.store(
        *(want, want, batch.key_frame, batch.kv_cache, batch.slot_mapping),
        positions=batch.positions,
    )
    key, value = torch.full((2, 1100, 2, head_dim), UNTOUCHED)
    rows = torch.tensor([0, 1100], dtype=torch.int32)
    ops.dequantize(batch.kv_cache, batch.block_table, rows[:1], rows, batch.key_frame, key, value)
    assert torch.equal(key, want)


@pytest.mark.parametrize(
    ("recent", "unit_map", "sentence"),
    [
        (True, None, "recent and unit_map must be given together"),
        (None, True, "recent and unit_map must be given together"),
        (torch.float32, True, "recent is float32, expected uint8"),
        (True, torch.int64, "unit_map is int64, expected int32"),
    ],
)
def test_wrong_copies_are_refused(
    recent: torch.dtype | bool | None, unit_map: torch.dtype | bool | None, sentence: str
) -> None:
    batch = make_batch((20,), (1,), 4, 2, 64)
    case = with_copies(batch, window_units=2)
    copies = [
        None if given is None else x if given is True else x.to(given)
        for given, x in ((recent, case.recent), (unit_map, case.unit_map))
    ]
    with pytest.raises(RuntimeError, match=sentence):
        dequantize(batch, [0], [20], torch.float32, *copies)


def test_opcheck_with_copies() -> None:
    batch = make_batch((20,), (1,), 4, 2, 64)
    case = with_copies(batch, window_units=2)
    key, value = torch.zeros(2, 20, 2, 64)
    rows = torch.tensor([0, 20], dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.turboquant.dequantize.default,
        (
            *(batch.kv_cache, batch.block_table, rows[:1], rows, batch.key_frame, key, value),
            *(case.recent, case.unit_map),
        ),
    )
