"""Hydra, and where measurements go."""
