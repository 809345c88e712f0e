"""python -m bench.support                # → docs/support-matrix.md; make matrix makes the files that it needs before

Test which files the compiler accepts: of other exporters, compared with ONNX Runtime, and of this project by each
frontend, compared with float64.
"""

from gpt.cli import run_main

if __name__ == "__main__":
    run_main("bench.studies.support")
