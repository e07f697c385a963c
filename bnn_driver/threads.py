"""The variables that tell the numerical libraries how many threads to use; they read them when they are imported."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
