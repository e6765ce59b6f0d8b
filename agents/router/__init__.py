"""The router network: its policy, the labelled tokens it learns from, and its training."""
