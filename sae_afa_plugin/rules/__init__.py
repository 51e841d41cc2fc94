"""Rules that choose the features of an input, as PyTorch operators with a backend for each device."""
