"""One file per code, found by its entry point in the group bnn_driver.oracles, and what codes in other processes need."""
