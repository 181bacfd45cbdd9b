"""A training iteration: plain ResNet, DAN with literal operators, and DAN."""
