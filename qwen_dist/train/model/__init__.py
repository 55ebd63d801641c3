"""The model that is trained: built or loaded, its attention, kernels, adapters, 4-bit weights and recomputed layers."""
