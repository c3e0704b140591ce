"""Benchmarks: ``python -m benchmarks`` runs all of them, ``python -m benchmarks.bench_decode --help`` explains one."""
