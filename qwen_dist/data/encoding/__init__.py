"""A row in normal form to token ids and masks: policies, chat template, tokenizer, turns, samples."""
