"""Arguments of a small memory step, one of which a test replaces."""

import re

import pytest
import torch

from dan_fast import MemoryState
from dan_fast.nn import ProgressiveAugmentedMemory
from tests.support.memory_problems import in_dtype, make_state

F64 = torch.float64
BATCH = ("keys", "labels", "unlabeled_keys", "sample_ids")
GATES = ("alpha", "alpha_unlabeled", "beta")
STATE_FIELDS = [f"{memory}.{field}" for memory in ("labeled", "unlabeled") for field in MemoryState._fields]
TENSORS = [*BATCH, *GATES, *STATE_FIELDS]
INTEGERS = [name for name in TENSORS if re.search("labels|used|ids", name)]
FLOATS = [name for name in TENSORS if name not in INTEGERS]


def arguments(dtype=F64):
    """`dtype` is that of the memories and of the keys."""
    generator = torch.Generator().manual_seed(3)
    keys, unlabeled_keys = (torch.randn(n, 3, generator=generator, dtype=F64).to(dtype) for n in (2, 3))
    return {
        "labeled": in_dtype(make_state("half", 5, 3, 3, "random", generator), dtype),
        "unlabeled": in_dtype(make_state("full", 4, 3, 3, "random", generator), dtype),
        "keys": keys,
        "labels": torch.tensor([2, 0]),
        "unlabeled_keys": unlabeled_keys,
        "sample_ids": torch.tensor([7, 8, 7]),
        "alpha": torch.tensor(0.4, dtype=F64),
        "alpha_unlabeled": torch.tensor(-0.2, dtype=F64),
        "beta": torch.tensor(0.3, dtype=F64),
    }


def get(given, name):
    memory, _, field = name.partition(".")
    return getattr(given[memory], field) if field else given[memory]


def put(given, name, value):
    memory, _, field = name.partition(".")
    return given | {memory: given[memory]._replace(**{field: value}) if field else value}


def tensors(given):
    """Those of arguments, or of a step."""
    values = given.values() if isinstance(given, dict) else given
    found = [x for value in values for x in (value if isinstance(value, MemoryState) else [value])]
    return [x for x in found if isinstance(x, torch.Tensor) and not x.is_meta]


def module():
    memory = ProgressiveAugmentedMemory(5, 4, 3, 0.9, 0.8, dtype=F64)
    given = arguments()
    memory.labeled, memory.unlabeled = given["labeled"], given["unlabeled"]
    return memory


def refuses(impl, given, error, match):
    before = [x.detach().clone() for x in tensors(given)]
    with pytest.raises(error, match=match) as raised:
        impl.memory_step(**given)
    for x, old in zip(tensors(given), before, strict=True):
        torch.testing.assert_close(x, old, rtol=0, atol=0, equal_nan=True)
    assert "\n" not in str(raised.value), "one sentence"
