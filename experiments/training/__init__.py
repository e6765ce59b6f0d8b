"""Training runs: one, or many in processes."""
