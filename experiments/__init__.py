"""Experiments: thin Hydra programs over envs and agents."""

import os

# GNU OpenMP reads it when torch is loaded. Threads that spin while they wait take the cores from whoever works beside
# them, and a pass then takes several times as long; a user's own choice stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
