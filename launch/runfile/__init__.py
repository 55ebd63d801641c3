"""The run file: read, checked, resolved; and the one that `init` writes."""
