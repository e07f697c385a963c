"""Decisions: which frames the ensemble may answer itself and which the oracle must label."""
