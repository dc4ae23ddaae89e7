"""Rows of `vllm-turboquant eval`: names, options and refusals."""

from __future__ import annotations

import pytest

from vllm_turboquant.evaluation.rows import DEFAULT_ROWS, RowError, parse_row, parse_rows

DTYPES = ("auto", "bfloat16", "fp8", "turboquant_3bit_nc")


def test_the_reference_comes_first_and_every_row_once() -> None:
    rows = parse_rows(["fp8", "naive_int8", "auto", "fp8"], DTYPES)
    assert [row.name for row in rows] == ["auto", "fp8", "naive_int8"]
    assert [row.is_reference for row in rows] == [True, False, False]


def test_default_rows_are_valid() -> None:
    assert [row.name for row in parse_rows(DEFAULT_ROWS, DTYPES)] == list(DEFAULT_ROWS)


def test_turboquant3_reads_every_token_back_unless_asked_otherwise() -> None:
    assert parse_row("turboquant3", DTYPES).options == {"exact_prefill": False}
    row = parse_row("turboquant3:exact_prefill=true", DTYPES)
    assert row.options == {"exact_prefill": True}
    assert row.is_flattering
    assert row.stem == "turboquant3-exact_prefill-true"


def test_a_simulated_row_has_an_auto_cache() -> None:
    row = parse_row("naive_int4", DTYPES)
    assert row.cache_dtype == "auto"
    assert row.fake_quantize == "vllm_turboquant.evaluation.naive:int4"
    assert not row.is_reference


@pytest.mark.parametrize(
    ("name", "reads_back"),
    {
        "auto": True,
        "fp8": True,
        "turboquant_3bit_nc": False,
        "naive_int8": True,
        "turboquant3": False,  # only decoding reads copies of recent tokens
        "turboquant3:recent_tokens=64": False,
        "turboquant3:recent_tokens=0": True,
        "turboquant3:exact_prefill=true": True,
        "turboquant3:recent_tokens=0,measure_keys=false": True,
    }.items(),
)
def test_which_rows_can_prefill_in_chunks(name: str, reads_back: bool) -> None:
    assert parse_row(name, DTYPES).reads_back_in_prefill is reads_back


@pytest.mark.parametrize(
    ("spec", "sentence"),
    {
        "fp7": "row 'fp7' is unknown; a row is one of auto, bfloat16, fp8, naive_int4",
        "fp8:exact_prefill=true": "only turboquant3 takes options; leave out ':exact_prefill=true'",
        "naive_int8:bits=3": "only turboquant3 takes options",
        "turboquant3:exact_prefill": "'exact_prefill' is not option=value, e.g. exact_prefill=true",
        "turboquant3:exact=true": "exact: Extra inputs are not permitted.*exact_prefill .default",
        "turboquant3:exact_prefill=maybe": "exact_prefill: Input should be a valid boolean",
        "turboquant3:recent_tokens=8": "recent_tokens: Input should be a multiple of 16",
    }.items(),
)
def test_refusals(spec: str, sentence: str) -> None:
    with pytest.raises(RowError, match=sentence):
        parse_rows([spec], DTYPES)


def test_rows_that_would_share_their_files_are_refused() -> None:
    with pytest.raises(RowError, match="differs from another one in punctuation only"):
        parse_rows(["turboquant3:exact_prefill=true", "turboquant3:exact_prefill= true"], DTYPES)
