"""Benchmarks: metalit beside its peers, on one machine, in one run. ``python -m benchmarks`` writes ``results.md``."""
