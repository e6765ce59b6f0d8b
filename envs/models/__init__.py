"""Models: what decodes, the pool of them, and how they are loaded."""
