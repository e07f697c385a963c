"""The run directory: labels, generations, events and locks on disk; numpy only, nothing unpickled."""
