"""Studies beside `python -m bench`, each with a command of its own."""
