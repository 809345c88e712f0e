"""Runs the engines: each in a process of its own, checked, timed in turns, and reported as rows of results."""
