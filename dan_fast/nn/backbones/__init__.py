"""The kinds of backbones, a file for each, and what they share: weights files and gradient checkpointing."""
