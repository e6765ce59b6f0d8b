"""From policies to measures: thresholds, baselines, sweeps, intervals."""
