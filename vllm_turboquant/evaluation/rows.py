"""Rows of the evaluation: one KV cache each, by the name that the command line gives it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_turboquant import CACHE_DTYPE
from vllm_turboquant.options import Options

REFERENCE = "auto"
WITHOUT_COPIES = f"{CACHE_DTYPE}:recent_tokens=0"
DEFAULT_ROWS = (
    *(REFERENCE, "fp8", "turboquant_3bit_nc", CACHE_DTYPE, WITHOUT_COPIES),
    *("naive_int8", "naive_int4"),
)

#: Codes that are no cache dtype: the function that replaces keys and values by their coded selves.
FAKE_QUANTIZERS = {
    "naive_int8": "vllm_turboquant.evaluation.naive:int8",
    "naive_int4": "vllm_turboquant.evaluation.naive:int4",
}

#: Cache dtypes whose attention reads every key and value from the cache even in prefill, as it does
#: in decoding: CPU_ATTN, FLASH_ATTN, FLASHINFER and TRITON_ATTN pass nothing but the paged cache to
#: their kernels. All others, vLLM's turboquant_* among them, which attends to raw keys and values
#: in prefill, are run one token a step: a decode step always reads the cache. turboquant3 does one
#: or the other, see ``Row.reads_back_in_prefill``.
READ_BACK_IN_PREFILL = {
    *("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"),
    *("int8_per_token_head", "fp8_per_token_head", "int4_per_token_head"),
}


class RowError(ValueError):
    """A row was asked for that does not exist; one sentence with what does."""


class Row(BaseModel):
    """One KV cache to measure.

    Attributes:
        name: As given; stands in tables and, without its punctuation, in file names.
        cache_dtype: Value of --kv-cache-dtype.
        options: The ``turboquant`` object of --additional-config.
        fake_quantize: ``module:function`` that maps keys and values [num_tokens, num_kv_heads,
            head_dim] of every layer to what a cache would return for them; None to write them as
            they are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    cache_dtype: str = REFERENCE
    options: Mapping[str, Any] = Field(default_factory=dict)
    fake_quantize: str | None = None

    @property
    def stem(self) -> str:
        """Name of this row's files."""
        return re.sub(r"[^\w.]+", "-", self.name)

    @property
    def is_reference(self) -> bool:
        """Whether the other rows are compared with this one."""
        return self.name == REFERENCE

    @property
    def reads_back_in_prefill(self) -> bool:
        """Whether prefill can be asked to read every key and value as decoding does.

        With exact_prefill off, turboquant3 reads codes in prefill, but no copies of recent tokens:
        those that decoding would read differ from row to row, and prefill reads the same for all.
        Who turns it on wants to see prefill as it is served.
        """
        if self.cache_dtype == CACHE_DTYPE:
            return self.is_flattering or not self.has_copies
        return self.cache_dtype in READ_BACK_IN_PREFILL

    @property
    def has_copies(self) -> bool:
        """Whether decoding reads 8-bit copies of recent tokens."""
        return self.cache_dtype == CACHE_DTYPE and Options(**self.options).recent_tokens > 0

    @property
    def is_flattering(self) -> bool:
        """Whether its options make prefill, and so every score of a text, skip the cache."""
        return self.options.get("exact_prefill") is True


def parse_rows(specs: Iterable[str], known_dtypes: Collection[str]) -> list[Row]:
    """Read the rows of the command line.

    Args:
        specs: ``NAME`` or ``NAME:option=value,...``.
        known_dtypes: Cache dtypes of this vLLM.

    Returns:
        The rows in the order given, each once, the reference first whether given or not.

    Raises:
        RowError: A name or an option that does not exist, or a wrong value.
    """
    names = dict.fromkeys((REFERENCE, *(spec.removesuffix(":") for spec in specs)))
    rows = [parse_row(name, known_dtypes) for name in names]
    stems = [row.stem for row in rows]
    for row in rows:
        if stems.count(row.stem) > 1:
            raise RowError(f"row {row.name!r} differs from another one in punctuation only")
    return rows


def parse_row(spec: str, known_dtypes: Collection[str]) -> Row:
    """Read one row; see ``parse_rows``."""
    name, _, options = spec.partition(":")
    if name == CACHE_DTYPE:
        # Prompts would otherwise be scored by exact attention and hardly see the cache.
        given = {"exact_prefill": False, **_parse_options(spec, options)}
        return Row(name=spec, cache_dtype=name, options=given)
    if name in FAKE_QUANTIZERS:
        row = Row(name=spec, fake_quantize=FAKE_QUANTIZERS[name])
    elif name in known_dtypes:
        row = Row(name=spec, cache_dtype=name)
    else:
        names = ", ".join(sorted({CACHE_DTYPE, *FAKE_QUANTIZERS, *known_dtypes}))
        raise RowError(f"row {spec!r} is unknown; a row is one of {names}")
    if options:
        raise RowError(f"row {spec!r}: only {CACHE_DTYPE} takes options; leave out ':{options}'")
    return row


def _parse_options(spec: str, text: str) -> dict[str, Any]:
    """``option=value,...`` with the values of ``options.Options``."""
    given: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        option, equals, value = item.partition("=")
        if not equals:
            raise RowError(f"row {spec!r}: {item!r} is not option=value, e.g. exact_prefill=true")
        try:
            given[option] = json.loads(value)
        except json.JSONDecodeError:
            given[option] = value
    try:
        Options(**given)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        accepted = "; ".join(
            f"{name} (default {field.default}): {field.description}"
            for name, field in Options.model_fields.items()
        )
        raise RowError(f"row {spec!r} is not valid ({wrong}); options are {accepted}") from None
    return given
