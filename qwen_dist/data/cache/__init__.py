"""Tokenized data: made once by all who want it, counted, written, and mapped into memory."""
