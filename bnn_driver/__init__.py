"""bnn-driver: an i-PI driver that keeps a simulation within a promised accuracy."""

__version__ = "0.1.0"
