"""Run the command line where its console script is not on PATH: python -m vllm_turboquant.cli."""

from vllm_turboquant.cli import main

main()
