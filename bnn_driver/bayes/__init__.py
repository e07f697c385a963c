"""The Bayesian network: likelihood, prior, sampler of the weights, and calibration of what it promises.

Pure: tensors in, tensors out; the network enters as a function, randomness as a seed or a generator.
"""
