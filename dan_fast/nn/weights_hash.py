"""Which network it is, by the numbers in it."""

import hashlib

import torch

from dan_fast.nn.network import DAN


def weights_hash(network: DAN) -> str:
    """What a feature depends on, in 32 hexadecimal digits, wherever its checkpoint lies: weights and preprocessing.

    Example:
        >>> network = DAN(num_classes=2, backbone="resnet18", image_size=(32, 16))
        >>> before = weights_hash(network)
        >>> _ = network.classifier.weight.data.neg_()
        >>> before == weights_hash(network)
        False
    """
    preprocessing = sorted(network.preprocessing.to_dict().items())
    settings = (network.backbone_name, network.image_size, preprocessing, network.feature, network.attention.variant)
    found = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    for name, value in sorted(network.state_dict().items()):
        value = value.detach().cpu().contiguous()
        found.update(repr((name, value.dtype, tuple(value.shape))).encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
