"""Print what pyproject.toml asks for with some extras, a line each: pip installs it before the source is there.

python docker/dependencies.py cuda,datasets > requirements.txt
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
wanted = [name for name in sys.argv[1].split(",") if name]
if unknown := [name for name in wanted if name not in extras]:
    sys.exit(f"extras {', '.join(unknown)}: not in pyproject.toml, which has {', '.join(extras)}")
print("\n".join([*project["dependencies"], *(line for name in wanted for line in extras[name])]))
