"""Synthetic pedestrians drawn by the package itself: domains for training and testing without a download."""

from dan_fast.data.synthetic.domains import DOMAINS, Domain
from dan_fast.data.synthetic.person import Identity, Pose, draw_person, sample_identity
from dan_fast.data.synthetic.scene import Camera, View, render, sample_camera, sample_view, scenery
from dan_fast.data.synthetic.writer import synthesize

__all__ = [
    "DOMAINS",
    "Camera",
    "Domain",
    "Identity",
    "Pose",
    "View",
    "draw_person",
    "render",
    "sample_camera",
    "sample_identity",
    "sample_view",
    "scenery",
    "synthesize",
]
