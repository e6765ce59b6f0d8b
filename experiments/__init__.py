"""Experiments: thin Hydra programs over envs and agents."""
