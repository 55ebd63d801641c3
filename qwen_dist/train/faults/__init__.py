"""What can go wrong while a run trains: how it is noticed, what is decided, what is done and told."""
