"""Rows of text to packs of tokens: rows, messages, system, spans, samples, prepare, pack, shard, batches."""
