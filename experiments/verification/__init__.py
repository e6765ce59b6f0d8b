"""Checks of an evaluation against its traces: models, tasks, ledgers, tables."""
