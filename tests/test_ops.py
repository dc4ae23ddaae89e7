"""Operators obey their schemas, and refuse wrong arguments with a sentence that names them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_turboquant import ops
from vllm_turboquant.frame import FIRST_SPAN
from vllm_turboquant.testing import make_batch

Arguments = dict[str, Any]


def store_arguments() -> Arguments:
    batch = make_batch((20,), (1,), 4, 2, 64)
    key, value = torch.randn(2, 20, 2, 64)
    return {
        "key": key,
        "value": value,
        "key_frame": batch.key_frame,
        "kv_cache": batch.kv_cache,
        "slot_mapping": batch.slot_mapping,
        "recent": None,
        "unit_map": None,
        "positions": batch.positions,
    }


def attention_arguments() -> Arguments:
    batch = make_batch((20, 7), (1, 2), 4, 2, 64)
    return {
        "query": batch.query,
        "kv_cache": batch.kv_cache,
        "block_table": batch.block_table,
        "seq_lens": batch.seq_lens,
        "query_start_loc": batch.query_start_loc,
        "key_frame": batch.key_frame,
        "scale": 0.125,
        "causal": True,
        "out": torch.zeros_like(batch.query),
        "lse": torch.zeros(4, batch.query.shape[0]),
    }


def dequantize_arguments() -> Arguments:
    batch = make_batch((20, 7), (1, 2), 4, 2, 64)
    key_out, value_out = torch.zeros(2, 27, 2, 64)
    return {
        "kv_cache": batch.kv_cache,
        "block_table": batch.block_table,
        "seq_starts": torch.zeros(2, dtype=torch.int32),
        "cu_seq_lens": torch.tensor([0, 20, 27], dtype=torch.int32),
        "key_frame": batch.key_frame,
        "key_out": key_out,
        "value_out": value_out,
    }


def assign_arguments() -> Arguments:
    return {
        "block_table": torch.tensor([[3, 1], [2, 0]], dtype=torch.int32),
        "seq_lens": torch.tensor([20, 7], dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 20, 27], dtype=torch.int32),
        "block_size": 16,
        "window_units": 2,
        "step": 1,
        "unit_map": torch.zeros(4, dtype=torch.int32),
        "places": torch.tensor([[-1, 0]] * 3, dtype=torch.int32),
        "clock": torch.zeros(6, dtype=torch.int32),
    }


OPERATORS: dict[str, tuple[Callable[..., None], Callable[[], Arguments]]] = {
    "store": (ops.store, store_arguments),
    "paged_attention": (ops.paged_attention, attention_arguments),
    "dequantize": (ops.dequantize, dequantize_arguments),
    "assign_recent": (ops.assign_recent, assign_arguments),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    operator = getattr(torch.ops.turboquant, name).default
    torch.library.opcheck(operator, tuple(OPERATORS[name][1]().values()))


def half(x: Tensor) -> Tensor:
    return x.half()


def double(x: Tensor) -> Tensor:
    return x.double()


def long(x: Tensor) -> Tensor:
    return x.long()


def last_axis_strided(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def parts_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def with_value(index: int, value: int) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        changed = x.clone()
        changed[index] = value
        return changed

    return change


REFUSALS: list[tuple[str, str, Callable[[Any], Any], str]] = [
    ("store", "key", double, "key is float64, expected float32, float16 or bfloat16"),
    ("store", "key", lambda x: x[0], "key has shape [2, 64], expected [any, any, any]"),
    ("store", "key", lambda x: x[:4], "expected at least slot_mapping's 20"),
    ("store", "key", last_axis_strided, "key has stride 2 along head_dim, expected 1"),
    ("store", "value", lambda x: x[:, :1], "value has shape [20, 1, 64], expected [any, 2, 64]"),
    ("store", "key_frame", half, "key_frame is float16, expected float32"),
    ("store", "key_frame", lambda x: x[:1], "key_frame has shape [1, 5, 64], expected [2, any, 64"),
    ("store", "key_frame", lambda x: x[:, 0], "key_frame has shape [2, 64], expected [2, any, 64]"),
    ("store", "key_frame", lambda x: x[:, :2], "key_frame has 2 rows, expected 3 or more"),
    ("store", "key_frame", last_axis_strided, "key_frame must be contiguous"),
    ("store", "kv_cache", lambda x: x.short(), "kv_cache is another dtype, expected uint8"),
    ("store", "kv_cache", lambda x: x[..., :43], "expected [any, any, any, 44]"),
    ("store", "kv_cache", lambda x: x[:, :, :8], "kv_cache has block_size 8, expected a multiple"),
    ("store", "kv_cache", lambda x: x[:, :1], "expected [any, 2, any, any]"),
    (
        "store",
        "kv_cache",
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "kv_cache must hold each (block, head) contiguously",
    ),
    ("store", "slot_mapping", lambda x: x.int(), "slot_mapping is int32, expected int64"),
    ("store", "slot_mapping", lambda x: x.repeat(2)[::2], "slot_mapping must be contiguous"),
    ("store", "slot_mapping", with_value(3, 9999), "slot_mapping has slot 9999, kv_cache has 64"),
    ("store", "positions", lambda x: x.int(), "positions is int32, expected int64"),
    (
        "store",
        "positions",
        lambda x: x[:19],
        "has 19 elements, expected at least slot_mapping's 20",
    ),
    ("store", "positions", lambda x: x.repeat(2)[::2], "positions must be contiguous"),
    ("store", "positions", lambda _: None, "positions must be given for a key_frame with 2 spans"),
    ("paged_attention", "query", lambda x: x[..., :48], "head_dim is 48, supported: 64, 128, 256"),
    ("paged_attention", "query", lambda x: x[:, :3], "3 heads, expected a positive multiple"),
    ("paged_attention", "query", lambda x: x[:, :0], "0 heads, expected a positive multiple"),
    ("paged_attention", "block_table", long, "block_table is int64, expected int32"),
    ("paged_attention", "block_table", lambda x: x[:1], "expected [2, any]"),
    ("paged_attention", "block_table", lambda x: x[:, :1], "block_table has room for 16"),
    ("paged_attention", "seq_lens", long, "seq_lens is int64, expected int32"),
    ("paged_attention", "query_start_loc", lambda x: x[:2], "query_start_loc has shape [2]"),
    ("paged_attention", "query_start_loc", with_value(2, 99), "query_start_loc ends at row 99"),
    ("paged_attention", "key_frame", double, "key_frame is float64, expected float32"),
    ("paged_attention", "key_frame", lambda x: x[:, :2], "key_frame has 2 rows, expected 3 or"),
    ("paged_attention", "key_frame", parts_first, "key_frame must be contiguous"),
    ("paged_attention", "out", double, "out is float64, expected float32, float16 or bfloat16"),
    ("paged_attention", "out", lambda x: x[:2], "query, out and lse have 6, 2 and 6"),
    ("paged_attention", "lse", half, "lse is float16, expected float32"),
    ("paged_attention", "lse", lambda x: x.T.contiguous().T, "lse has stride 4 along tokens"),
    ("dequantize", "cu_seq_lens", with_value(2, 99), "cu_seq_lens ends at row 99"),
    ("dequantize", "seq_starts", with_value(0, 40), "seq_starts asks for tokens up to 60"),
    ("dequantize", "seq_starts", with_value(1, -1), "seq_starts asks for tokens up to 6"),
    ("dequantize", "key_frame", half, "key_frame is float16, expected float32"),
    ("dequantize", "key_frame", lambda x: x[..., :32], "shape [2, 5, 32], expected [2, any, 64]"),
    ("dequantize", "key_frame", lambda x: x[:, :2], "key_frame has 2 rows, expected 3 or more"),
    ("dequantize", "key_frame", parts_first, "key_frame must be contiguous"),
    ("dequantize", "key_out", double, "key_out is float64"),
    ("dequantize", "value_out", lambda x: x[:20], "key_out and value_out have 27 and 20"),
    ("assign_recent", "block_table", lambda x: x[:1], "expected [2, any]"),
    ("assign_recent", "seq_lens", long, "seq_lens is int64, expected int32"),
    ("assign_recent", "query_start_loc", lambda x: x[:2], "query_start_loc has shape [2]"),
    ("assign_recent", "block_size", lambda _: 24, "block_size is 24, expected a multiple of 16"),
    ("assign_recent", "window_units", lambda _: 0, "window_units is 0, expected 1 to 8"),
    ("assign_recent", "window_units", lambda _: 9, "window_units is 9, expected 1 to 8"),
    ("assign_recent", "unit_map", long, "unit_map is int64, expected int32"),
    ("assign_recent", "places", lambda x: x[:, :1], "places has shape [3, 1], expected [any, 2]"),
    ("assign_recent", "places", lambda x: x[:0], "places has 0 rows, expected 1 to 32766"),
    ("assign_recent", "clock", lambda x: x[:5], "clock has shape [5], expected [6]"),
]


@pytest.mark.parametrize(
    ("operator", "argument", "change", "sentence"),
    REFUSALS,
    ids=[f"{operator} {sentence}" for operator, _, _, sentence in REFUSALS],
)
def test_refusals(
    operator: str, argument: str, change: Callable[[Any], Any], sentence: str
) -> None:
    run, arguments = OPERATORS[operator]
    given = arguments()
    run(*given.values())
    given[argument] = change(given[argument])
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        run(*given.values())


def test_frames_without_spans_need_no_positions() -> None:
    given = store_arguments()
    given["key_frame"] = given["key_frame"][:, :FIRST_SPAN].contiguous()
    ops.store(**{**given, "positions": None})
    without = given["kv_cache"].clone()
    ops.store(**given)
    assert torch.equal(given["kv_cache"], without)


def test_a_missing_library_is_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(ops, "__file__", str(tmp_path / "ops.py"))
    with pytest.raises(ImportError, match=r"was not built in .*; build it with: pip install"):
        ops._load_cpu_library()
