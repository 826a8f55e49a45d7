"""Repairing a pruned model by training it on: the weights that are zero stay zero."""
