"""Measure what a model loses with each KV cache, through vLLM itself.

``rows`` names the caches; ``prepare`` makes the ``plan``, which fixes what every row is asked;
``runner`` starts a process for each row, in which ``run_row`` asks an ``engine`` and its
``recorder``; ``report`` and ``plots`` show the results.
"""
