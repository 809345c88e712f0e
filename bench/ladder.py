"""python -m bench.ladder artifacts/model.onnx --shape 1x64

What each step of the compiler adds on one model: it is compiled again and again, each time with one phase more, then
with everything in fewer bits, and all of these take turns. The table is that of docs/cpu-lowering.md.
"""

from bench.studies.ablation import main
from gpt.cli import run_command

if __name__ == "__main__":
    run_command(main)
