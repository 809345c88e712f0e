"""The reference GPT and its training. Imports nothing else of the project."""
