"""The prefix tree: what greedy decoding did, remembered."""
