"""Agents: policies that choose which model writes the next token, and the learners that make them."""
