"""From the user's files to the tensors of a step; each package imports from those to its left only.

reading (files to rows) -> formats (rows in normal form) -> encoding (token ids and masks) -> cache (tokenized once,
memory-mapped) -> order (mixture, packs, steps) -> batches (tensors)
"""
