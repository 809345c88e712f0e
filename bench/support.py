"""python -m bench.support                                # 20 minutes of one core → docs/support-matrix.md

Test which files each frontend of the compiler accepts: export, compile and run each, and compare it with float64.
"""

from gpt.cli import run_main

if __name__ == "__main__":
    run_main("bench.studies.support")
