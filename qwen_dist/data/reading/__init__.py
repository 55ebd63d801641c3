"""Files of every kind as rows with their places: which files there are, their bytes, their rows."""
