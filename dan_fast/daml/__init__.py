"""Data assimilation meta-learning, Sec. III-D: meta gradients, the competition and the piecewise groups."""

from dan_fast.daml.competition import Competition, Stage, accuracies_tie, active_groups, attention_wins
from dan_fast.daml.meta import MetaGradients, meta_gradients
from dan_fast.daml.traced import TracedLosses, random_state

__all__ = [
    "Competition",
    "MetaGradients",
    "Stage",
    "TracedLosses",
    "accuracies_tie",
    "active_groups",
    "attention_wins",
    "meta_gradients",
    "random_state",
]
