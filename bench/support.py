"""python -m bench.support                                # 20 minutes of one core → docs/support-matrix.md

Which files each frontend of the compiler takes: every one is exported, compiled, run and compared with float64.
"""

from bench.studies.support import main
from gpt.cli import run_command

if __name__ == "__main__":
    run_command(main)
