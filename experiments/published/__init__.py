"""Results that ship with the project: a file a run, what made it, and what checks it."""
