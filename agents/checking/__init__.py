"""Policies that decide when the LLM is called, which then checks what was drafted."""
