"""User options: the ``turboquant`` object of vLLM's ``--additional-config``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_turboquant.errors import OptionsError
from vllm_turboquant.layout import UNIT_TOKENS

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY = "turboquant"
#: What copies of recent tokens take at most, of the memory of the KV cache.
MAX_COPIES_SHARE = 0.04


class Options(BaseModel):
    """Settings of the cache: ``--additional-config '{"turboquant": {"exact_prefill": false}}'``.

    Unknown names and values of another type are refused.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    exact_prefill: bool = Field(
        True,
        description="true: tokens of one prefill chunk attend to each other before compression; "
        "false: every token is read back from the compressed cache",
    )
    measure_keys: bool = Field(
        True,
        description="true: at load, measure what the keys of a head have in common and leave it "
        "out of their codes; false: code keys as they come",
    )
    recent_tokens: int = Field(
        32,
        ge=0,
        le=112,
        multiple_of=UNIT_TOKENS,
        description="how many of a request's newest tokens decoding reads from 8-bit copies "
        "instead of codes, at least, where there is memory for them: a multiple of 16 up to 112, "
        "0 for none; prefill with exact_prefill off reads codes only, but for chunks of one token",
    )

    @property
    def window_units(self) -> int:
        """Units of 16 tokens that have the newest ``recent_tokens`` among them.

        One more than they fill: the newest unit may have but one token.
        """
        return self.recent_tokens // UNIT_TOKENS + 1


def read_options(vllm_config: VllmConfig) -> Options:
    """Read and validate the options of one engine.

    Raises:
        OptionsError: One line that names what is wrong and lists what is accepted.
    """
    additional: Any = vllm_config.additional_config
    given = additional.get(KEY, {}) if isinstance(additional, dict) else {}
    accepted = "; ".join(
        f"{name} ({field.annotation.__name__}, default {field.default}): {field.description}"
        for name, field in Options.model_fields.items()
        if isinstance(field.annotation, type)
    )
    if not isinstance(given, dict):
        raise OptionsError(
            f'--additional-config: "{KEY}" must be an object, got {given!r}; accepted: {accepted}'
        )
    try:
        return Options(**given)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(str(part) for part in item['loc'])}={item['input']!r}: {item['msg']}"
            for item in error.errors()
        )
        raise OptionsError(
            f'--additional-config: "{KEY}" is not valid ({wrong}); accepted: {accepted}'
        ) from None
