"""`python -m qwen_dist.train.preflight RUN_DIR`: every rank of a job looks at its node before training begins.

Ranks meet through files in the run directory first, so that a node whose GPU, network or Python does not work can be
named; only then do they try a collective. Each step has a time limit: a bad node delays the others, it cannot hang
them.
"""
