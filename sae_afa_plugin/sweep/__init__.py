"""Sweeps: many SAEs from one config, trained on the same activations, evaluated, compared."""
