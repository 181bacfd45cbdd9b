"""The kinds of backbones, a file each, and what they share: weights files and gradient checkpointing."""
