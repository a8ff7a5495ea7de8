"""Anchoring a receipt log: its signed checkpoints on the chain, one compare-and-set transaction per batch."""
