"""How the tests run: the long files first, each worker with its share of the cores, one file in this process."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports PyTorch or NumPy; the processes that a test starts inherit it.
if "PYTEST_XDIST_WORKER" in os.environ:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """None where a single file is asked for: it imports PyTorch once, and a debugger works."""
    files = {argument.partition("::")[0] for argument in config.args}
    return 0 if len(files) == 1 and os.path.isfile(files.pop()) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    long = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("compile")}
    items.sort(key=lambda item: item.path not in long)
    of_a_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if of_a_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in of_a_gpu:
                item.add_marker(pytest.mark.skip(reason="there is no GPU"))


def pytest_collection_finish() -> None:
    """What was imported and collected stays until the end: no search for garbage has to go through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def heap_is_left() -> Iterator[None]:
    """A command that runs in this process would keep its heap for all tests that follow, which measure memory.

    Fixtures of modules run commands too.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dan_fast.core.heap.keep_heap", lambda: False)
        yield


@pytest.fixture
def sound_bfloat16() -> Iterator[None]:
    """PyTorch's own convolutions: oneDNN's of small maps in bfloat16 read memory never written (docs/limits.md)."""
    import torch

    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=False):
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tiny network as it was before training."""
    from tests.support.untrained import untrained_checkpoint

    return untrained_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint.pt")


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn dataset with train, query and gallery images, of the size that `checkpoint` takes."""
    from dan_fast.data.synthetic import synthesize

    root = tmp_path_factory.mktemp("synthetic")
    synthesize(root, ["street"], identities=6, cameras=2, image_size=(32, 16), test_fraction=0.5)
    return root / "street"


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each batch had that a network embedded."""
    from dan_fast import FeatureExtractor

    counts, embed = [], FeatureExtractor._embed
    monkeypatch.setattr(FeatureExtractor, "_embed", lambda self, x: counts.append(len(x)) or embed(self, x))
    return counts


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains, campus and mall, of four training and two test persons with four images each."""
    from dan_fast.data.synthetic import synthesize

    root = tmp_path_factory.mktemp("images")
    synthesize(root, ["campus", "mall"], identities=6, cameras=2, images_per_camera=2, image_size=(32, 32), seed=1,
               test_fraction=0.34)  # fmt: skip
    return root


@pytest.fixture
def forget() -> Iterator[None]:
    """Forgets what is known of the extension, before and after, so that a test can take it away."""
    from dan_fast import _extension

    caches = (_extension.build_info, _extension._load, _extension.why_not_on, _extension._warn_once)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()
