"""Checks that an engine's numbers are right: the reference, the tolerance of each precision, the loss on a text."""
