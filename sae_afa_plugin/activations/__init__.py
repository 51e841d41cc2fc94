"""Where activations come from: language models, their hooks and text, and recordings."""
