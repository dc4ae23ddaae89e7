#!/usr/bin/env python3
"""Run lm-eval with the tasks of configs/lm_eval against a running server.

    run_lm_eval.py models/smollm2-135m-instruct --port 8000 [arguments of lm_eval]

For a quick look: --limit 4 (prompts of each task). One task: --tasks turboquant_needle.
Prints the lm_eval command it runs, so that it can be repeated or changed by hand.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from vllm_server import served_model

ROOT = Path(__file__).resolve().parent.parent
TASKS = "turboquant_needle,turboquant_perplexity"


def main() -> None:
    """Evaluate and exit with lm_eval's exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__.split("\n")[0],
        epilog="Any other argument goes to lm_eval.",
    )
    parser.add_argument("model", type=Path, help="folder of the served model, for its tokenizer")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument("--tasks", default=TASKS, help="default: %(default)s")
    options, passed_on = parser.parse_known_args()
    url = f"http://localhost:{options.port}"
    name, max_model_len = served_model(url)
    model_args = {
        "model": name,
        "base_url": f"{url}/v1/completions",
        "tokenizer": options.model,
        "tokenizer_backend": "huggingface",
        "max_length": max_model_len,
        "timeout": 1800,  # seconds for one request; a long prompt on few cores takes minutes
    }
    command = [
        str(Path(sys.executable).with_name("lm_eval")),
        "--model=local-completions",
        "--model_args=" + ",".join(f"{key}={value}" for key, value in model_args.items()),
        f"--include_path={ROOT / 'configs' / 'lm_eval'}",
        f"--tasks={options.tasks}",
        *passed_on,
    ]
    print(shlex.join(command), flush=True)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "NO_PROXY": "localhost"}
    sys.exit(subprocess.call(command, env={**os.environ, **offline}))


if __name__ == "__main__":
    main()
