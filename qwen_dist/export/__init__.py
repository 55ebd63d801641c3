"""From a sharded checkpoint to a Hugging Face folder that has been reloaded and compared."""
