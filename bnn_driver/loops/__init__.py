"""The stories: what happens in which order.  Time, files and processes live here and below, never in floor 1."""
