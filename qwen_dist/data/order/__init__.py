"""Which samples make up which step, and which rank computes which: mixture, packs, steps, ledger."""
