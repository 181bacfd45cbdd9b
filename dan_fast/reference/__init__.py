"""The paper in readable PyTorch: one sample at a time, differentiable any number of times."""
