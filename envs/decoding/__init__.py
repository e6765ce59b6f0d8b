"""Decoding: sessions of sequences in flight, the one decoding step, and reading what is given."""
