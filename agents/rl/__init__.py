"""Stable-Baselines3 on the environments, and its networks as policies."""
