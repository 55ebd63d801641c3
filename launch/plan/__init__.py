"""What a plan is made of: machines, data, choice, measurements."""
