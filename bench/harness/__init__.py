"""Runs engines: what is asked of them, each in a process of its own, timed in turns, and the results as rows."""
