"""The embedded default: a small language model, its text, and the demonstration."""
