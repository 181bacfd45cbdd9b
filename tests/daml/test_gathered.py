"""Copies in one block: equal, of the same layout, and of no storage that the caller has."""

import torch

from dan_fast.daml.gathered import gathered


def test_each_dtype_has_a_block_and_each_tensor_its_values_and_strides():
    tensors = {
        "weight": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
        "shape": torch.randn(5, 2).T,
        "double": torch.randn(3, dtype=torch.float64),
        "scalar": torch.randn(()),
        "none": torch.randn(0, 2),
        "expanded": torch.randn(2, 1).expand(2, 3),
    }
    found = gathered(tensors)
    assert list(found) == list(tensors)
    for name, each in tensors.items():
        assert torch.equal(found[name], each) and found[name].dtype is each.dtype
        assert found[name].is_contiguous() if name == "expanded" else found[name].stride() == each.stride()
    storages = {name: each.untyped_storage().data_ptr() for name, each in found.items()}
    assert len(set(storages.values())) == 2 and len({storages[name] for name in storages if name != "double"}) == 1
    before = {name: each.clone() for name, each in found.items()}
    tensors["weight"].zero_()
    found["shape"].add_(1)
    for name in ("weight", "double", "scalar", "expanded"):
        assert torch.equal(found[name], before[name])


def test_a_tensor_stays_on_its_device():
    tensors = {"here": torch.ones(2), "there": torch.ones(2, device="meta")}
    found = gathered(tensors)
    assert found["here"].tolist() == [1, 1] and found["there"].is_meta
    assert all(found[name] is not each for name, each in tensors.items())


def test_sparse_gradients_become_dense():
    value = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    found = gathered({"sparse": value.to_sparse(), "dense": torch.ones(1)})
    assert torch.equal(found["sparse"], value)
