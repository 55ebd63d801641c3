"""Around a batch job: its options, its submission, its signals."""
