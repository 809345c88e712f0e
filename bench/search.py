"""python -m bench.search                                 # both models, 50, 200 and 800 trials: some ten minutes
python -m bench.search --trials 4 8 --models linear       # a rehearsal
python -m bench.search --models relay                     # the demo model by Relay and its search, after make relay

Compare hand-written kernels with a MetaSchedule search: the time until the code is ready, and its speed. Prints the
tables of docs/hand-and-search.md and docs/relay-to-relax.md. Each model is searched once; the search continues from one
number of trials to the next.
"""

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is one line too
    from gpt.cli import run_main

    run_main("bench.search", prints=True)

from bench.studies import search


def main() -> None:
    """Run the command line, whose help begins with this file's text."""
    search.main(__doc__)
