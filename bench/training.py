"""python -m bench.training recipe --corpus input.txt
python -m bench.training throughput

Compare training with two references: the loss that nanoGPT publishes for its CPU recipe, and a plain loop's speed.
"""

from bench.studies.training import main
from gpt.cli import run_command

if __name__ == "__main__":
    run_command(main)
