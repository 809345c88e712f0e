"""Whether the numbers are right: the reference, the tolerance of each precision, the loss on a text."""
