"""DeepSpeed's keys: which may be overridden, how, and the presets."""
