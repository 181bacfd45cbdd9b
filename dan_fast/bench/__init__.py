"""Benchmarks that check that the results agree before they compare times."""

from dan_fast.bench.agreement import compare
from dan_fast.bench.command import bench_memory
from dan_fast.bench.contenders import select
from dan_fast.bench.problem import Size, make_problem

__all__ = ["Size", "bench_memory", "compare", "make_problem", "select"]
