"""turboquant3: a 6x smaller KV cache for stock vLLM."""

__version__ = "0.1.0"

#: Value of --kv-cache-dtype.
CACHE_DTYPE = "turboquant3"
