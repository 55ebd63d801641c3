"""Rows of every format in normal form: roles, texts, weights."""
