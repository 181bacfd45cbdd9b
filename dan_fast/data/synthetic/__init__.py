"""Synthetic pedestrians drawn by the package itself: domains for training and testing without a download."""

from dan_fast.data.synthetic.domains import DOMAINS
from dan_fast.data.synthetic.writer import synthesize

__all__ = ["DOMAINS", "synthesize"]
