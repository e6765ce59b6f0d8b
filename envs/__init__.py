"""Environments: token-level LLM routing as a decision process."""
