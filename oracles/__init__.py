"""One file per code; each is found by its entry point in the group bnn_driver.oracles."""
