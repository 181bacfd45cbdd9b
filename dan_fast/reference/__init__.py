"""The paper in readable PyTorch: one sample at a time, differentiable any number of times."""

from dan_fast.reference.attention import attention_adversary, attention_head, nl_cbam
from dan_fast.reference.types import AdversaryOutput, AttentionHeadOutput, NLCBAMOutput, NLCBAMWeights

__all__ = [
    "AdversaryOutput",
    "AttentionHeadOutput",
    "NLCBAMOutput",
    "NLCBAMWeights",
    "attention_adversary",
    "attention_head",
    "nl_cbam",
]
