"""Compares every engine on one GPU: inputs and outputs stay on the device, whose own clock times the calls."""
