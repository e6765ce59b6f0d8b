"""Query-level experiments: splits of queries and models, and their measures."""
