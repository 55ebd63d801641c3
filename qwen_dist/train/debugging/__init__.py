"""One process that tells what it computes: a few steps of a run, or one rank's step of a recorded one."""
