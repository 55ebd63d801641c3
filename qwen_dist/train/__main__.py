"""`python -m qwen_dist.train RUN_DIR`: what the launcher starts on every rank."""

import sys

from qwen_dist.train.main import main

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m qwen_dist.train RUN_DIR")
    sys.exit(main(sys.argv[1]))
