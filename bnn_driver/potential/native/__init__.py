"""The two inner loops of MACE as C++ for CPUs, compiled on the machine where they run."""
