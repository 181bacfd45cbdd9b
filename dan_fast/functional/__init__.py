"""The fast forms of `dan_fast.reference`, same names and signatures."""

from dan_fast.core.types import (
    AdversaryOutput,
    AttentionHeadOutput,
    MemoryState,
    MemoryStep,
    NLCBAMOutput,
    NLCBAMWeights,
)
from dan_fast.functional.attention import attention_adversary, attention_head, nl_cbam
from dan_fast.functional.discriminative import discriminative_loss
from dan_fast.functional.memory import cosine_softmax, false_sample_sets, memory_step
from dan_fast.functional.styles import mix_styles

__all__ = [
    "AdversaryOutput",
    "AttentionHeadOutput",
    "MemoryState",
    "MemoryStep",
    "NLCBAMOutput",
    "NLCBAMWeights",
    "attention_adversary",
    "attention_head",
    "cosine_softmax",
    "discriminative_loss",
    "false_sample_sets",
    "memory_step",
    "mix_styles",
    "nl_cbam",
]
