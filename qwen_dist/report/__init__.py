"""What a run says about itself: metrics, tracking, progress, curves."""
