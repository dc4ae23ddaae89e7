"""User options: the ``turboquant`` object of vLLM's ``--additional-config``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_turboquant.errors import OptionsError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY = "turboquant"


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
