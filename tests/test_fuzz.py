"""Random shapes, lengths and layouts: kernels against the reference."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_attention import check, with_random_origins
from vllm_turboquant import ops
from vllm_turboquant.testing import make_batch


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, object]:
    num_reqs = draw(st.integers(1, 4))
    num_kv_heads = draw(st.integers(1, 3))
    return {
        "seq_lens": tuple(draw(st.integers(0, 200)) for _ in range(num_reqs)),
        "query_lens": tuple(draw(st.integers(0, 12)) for _ in range(num_reqs)),
        "num_heads": num_kv_heads * draw(st.integers(1, 9)),
        "num_kv_heads": num_kv_heads,
        "head_dim": draw(st.sampled_from([64, 128, 256])),
        "block_size": draw(st.sampled_from([16, 32, 48, 128])),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "head_major": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }


@settings(max_examples=40)
@given(shape=shapes(), causal=st.booleans())
def test_store_and_attention(shape: dict[str, object], causal: bool) -> None:
    batch = make_batch(**shape)  # type: ignore[arg-type]
    by_kernel = make_batch(**shape, store=ops.store)  # type: ignore[arg-type]
    assert torch.equal(by_kernel.kv_cache, batch.kv_cache)
    check(with_random_origins(batch), causal)
