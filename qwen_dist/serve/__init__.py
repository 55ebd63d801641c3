"""Talking to a trained model: loading, streaming generation, chat."""
