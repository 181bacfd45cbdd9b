"""Benchmarks that check that the results agree before they compare times."""

from dan_fast.bench.attention import AttentionBenchmark
from dan_fast.bench.data import DataBenchmark
from dan_fast.bench.epoch.benchmark import EpochBenchmark
from dan_fast.bench.iteration.benchmark import IterationBenchmark
from dan_fast.bench.memory.benchmark import MemoryBenchmark
from dan_fast.bench.ranking import RankingBenchmark
from dan_fast.bench.search import SearchBenchmark

# `dan-fast bench NAME`, and its line in the list of benchmarks.
BENCHMARKS = {
    "memory": (MemoryBenchmark, "The memory step: literal, in score space, compiled, and kernels."),
    "attention": (AttentionBenchmark, "The attention head: eager, compiled, and kernels."),
    "iteration": (IterationBenchmark, "A training iteration: plain ResNet, DAN with literal operators, and DAN."),
    "epoch": (EpochBenchmark, "An epoch from JPEG files: a plain PyTorch loop, the same from the cache, and DAN."),
    "data": (DataBenchmark, "Feeding images: a plain DataLoader, decoding without a cache, and from the cache."),
    "ranking": (RankingBenchmark, "Evaluating a ranking: by sorting in NumPy, and by counting."),
    "search": (SearchBenchmark, "Searching a million features: comparing all, HNSW and IVF-PQ, and the ranking."),
}
