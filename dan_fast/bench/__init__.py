"""Benchmarks that check that the results agree before they compare times."""

from dan_fast.bench.agreement import compare
from dan_fast.bench.attention_command import bench_attention
from dan_fast.bench.command import bench_memory
from dan_fast.bench.contenders import select
from dan_fast.bench.data_command import bench_data
from dan_fast.bench.iteration_command import bench_iteration
from dan_fast.bench.problem import Size, make_problem
from dan_fast.bench.ranking_command import bench_ranking

__all__ = [
    "Size",
    "bench_attention",
    "bench_data",
    "bench_iteration",
    "bench_memory",
    "bench_ranking",
    "compare",
    "make_problem",
    "select",
]
