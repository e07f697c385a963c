"""What a run has done, from the files of its run directory alone: numbers, text and figures."""
