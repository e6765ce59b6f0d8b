"""Training of the embedded models, from a recipe to weights."""
