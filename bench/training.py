"""python -m bench.training recipe --corpus input.txt
python -m bench.training throughput

Compare training with two references: the loss that nanoGPT publishes for its CPU recipe, and a plain loop's speed.
"""

from gpt.cli import run_main

if __name__ == "__main__":
    run_main("bench.studies.training")
