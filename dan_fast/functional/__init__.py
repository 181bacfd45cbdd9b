"""The fast forms of `dan_fast.reference`, same names and signatures."""

from dan_fast.functional.attention import attention_adversary, attention_head, nl_cbam
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
