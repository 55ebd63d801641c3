"""Templates of batch scripts; `launch/sbatch.py` fills them."""
