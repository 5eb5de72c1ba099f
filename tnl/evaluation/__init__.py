"""Evaluation: held-out loss, and the n-gram models that it is compared with."""
