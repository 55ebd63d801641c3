"""`qwen-dist doctor`: is this machine, and what is around it, ready for a run?"""
