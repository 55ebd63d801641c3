"""The launcher: decides, shows and starts. It never imports torch, transformers or deepspeed."""
