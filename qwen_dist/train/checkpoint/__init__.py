"""Checkpoints: what is saved of each rank, how it is committed whole, and how it comes back on any world size."""
