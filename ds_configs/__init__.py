"""DeepSpeed presets to read and copy; `launch/zero.py` generates them."""
