"""The trainer: `python -m qwen_dist.train RUN_DIR`."""
