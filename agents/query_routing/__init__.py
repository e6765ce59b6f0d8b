"""Routing whole queries: outcomes, embeddings, routers and their learners."""
