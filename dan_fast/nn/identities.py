"""The memory with one slot a person, as a module."""

import torch
from torch import Tensor, nn

from dan_fast.functional.identities import identity_loss, write_identities
from dan_fast.reference.identity_checks import check_momentum, check_temperature


class IdentityMemory(nn.Module):
    """M with one slot a person: what `loss` compares a key with, and every key moves the slot of its own person.

    The slots are buffers: they stand in the state dict and follow `.to()`. They carry no gradient.

    Args:
        num_identities: n, slots.
        key_dim: d, length of a key.
        momentum: what stays of a slot when keys of its person come, in [0, 1).
        temperature: divides the cosines; small ones attend to the hardest other persons.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> memory = IdentityMemory(num_identities=2, key_dim=2, temperature=1.0)
        >>> keys, labels = torch.eye(2), torch.tensor([0, 1])
        >>> memory.write(keys, labels)
        >>> memory.loss(keys, labels)
        tensor([0.3133, 0.3133])
    """

    def __init__(self, num_identities: int, key_dim: int, momentum: float = 0.2, temperature: float = 0.05) -> None:
        super().__init__()
        for name, size in (("num_identities", num_identities), ("key_dim", key_dim)):
            if size < 1:
                raise ValueError(f"{name} must be positive, got {size}")
        check_momentum(momentum)
        check_temperature(temperature)
        self.momentum, self.temperature = momentum, temperature
        self.register_buffer("identities", torch.zeros(num_identities, key_dim))
        self.register_buffer("known", torch.zeros(num_identities, dtype=torch.bool))

    def loss(self, keys: Tensor, labels: Tensor) -> Tensor:
        """(B,) losses of keys (B, d) with labels (B,) int64; see `functional.identity_loss`."""
        return identity_loss(keys, labels, self.identities, self.known, self.temperature)

    @torch.no_grad()
    def write(self, keys: Tensor, labels: Tensor) -> None:
        """Move the slots of the persons in `labels` (B,) int64 towards their keys (B, d); -1 leaves a key out.

        A key that is not finite leaves all slots as they were, without waiting for the device.
        """
        # A graph may hold the slots that `loss` read: they are replaced, not changed.
        sound = keys.isfinite().all()
        identities, known = write_identities(self.identities, self.known, keys, labels, self.momentum)
        self.identities = torch.where(sound, identities, self.identities)
        self.known = torch.where(sound, known, self.known)

    def extra_repr(self) -> str:
        count, key_dim = self.identities.shape
        return f"num_identities={count}, key_dim={key_dim}, momentum={self.momentum}, temperature={self.temperature}"
