"""What `inspect` tells: counts, samples as tokens, and what serving feeds.

The runtime's data part is imported inside the functions; none of it imports torch.
"""
