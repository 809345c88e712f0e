"""python -m bench.ladder artifacts/model.onnx --shape 1x64

Ablation study of the compiler on one model: compile it with one more phase at each step, then with all phases at lower
precisions, time all builds in turns, and print the table of docs/cpu-lowering.md.
"""

from gpt.cli import run_main

if __name__ == "__main__":
    run_main("bench.studies.ablation", prints=True)
