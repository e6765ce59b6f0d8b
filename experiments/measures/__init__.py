"""What evaluations are measured by: curves, their measures, and intervals."""
