"""Token-level preferences: what decides them, how they are collected, where they are kept."""
