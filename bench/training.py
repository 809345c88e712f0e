"""python -m bench.training recipe --corpus input.txt
python -m bench.training throughput

Two bars of the training: the loss that nanoGPT publishes for its CPU recipe, and the speed of a plain loop.
"""

from bench.studies.training import main
from gpt.cli import run_command

if __name__ == "__main__":
    run_command(main)
