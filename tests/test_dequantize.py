"""The paged dequantize kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from tests.test_attention import with_random_origins
from vllm_turboquant import ops, reference
from vllm_turboquant.frame import CENTER, SINK
from vllm_turboquant.layout import SlotLayout
from vllm_turboquant.testing import assert_close, make_batch

UNTOUCHED = 7.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("head_dim", "block_size"), [(64, 16), (64, 128), (128, 48), (256, 16), (512, 32)]
)
def test_ranges_of_tokens(head_dim: int, block_size: int, dtype: torch.dtype) -> None:
    layout = SlotLayout(head_dim)
    batch = with_random_origins(make_batch((100, 0, 77), (1, 1, 1), 4, 2, head_dim, block_size))
    first, last = (5, 0, 16), (90, 0, 77)
    lengths = [b - a for a, b in zip(first, last, strict=True)]
    cu_seq_lens = torch.tensor([0, *lengths]).cumsum(0).int()
    rows = int(cu_seq_lens[-1])
    key, value = torch.full((2, rows + 2, 2, head_dim), UNTOUCHED, dtype=dtype)
    ops.dequantize(
        batch.kv_cache,
        batch.block_table,
        torch.tensor(first, dtype=torch.int32),
        cu_seq_lens,
        batch.key_frame,
        key,
        value,
    )
    want_key, want_value = [], []
    for req, (a, b) in enumerate(zip(first, last, strict=True)):
        key_code, value_code = reference.load(batch.kv_cache, batch.block_table[req], b, layout)
        want_key.append(reference.decode_keys(key_code, batch.key_frame, layout)[a:])
        want_value.append(reference.decode_values(value_code, layout)[a:])
    rounding = max(torch.finfo(dtype).eps, 1e-6)
    assert_close(key[:rows], torch.cat(want_key), rounding, "keys")
    assert_close(value[:rows], torch.cat(want_value), rounding, "values")
    assert (key[rows:] == UNTOUCHED).all() and (value[rows:] == UNTOUCHED).all()


@pytest.mark.parametrize("head_dim", [64, 256])
def test_keys_that_equal_an_origin_come_back_exactly(head_dim: int) -> None:
    batch = make_batch((40,), (1,), 4, 2, head_dim)
    at_sink = (torch.arange(40) % 3 == 0)[:, None, None]
    want = torch.where(at_sink, batch.key_frame[:, SINK], batch.key_frame[:, CENTER])
    ops.store(want, want, batch.key_frame, batch.kv_cache, batch.slot_mapping)
    key, value = torch.full((2, 40, 2, head_dim), UNTOUCHED)
    rows = torch.tensor([0, 40], dtype=torch.int32)
    ops.dequantize(batch.kv_cache, batch.block_table, rows[:1], rows, batch.key_frame, key, value)
    assert torch.equal(key, want)
