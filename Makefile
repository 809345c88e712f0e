# Each target sets up what it needs and can be run again. `make` alone lists them.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
RELAY_INSTALLED := .venv-relay/installed
# Relay's packages are of Python 3.11: PYTHON if it is that, or another that is here and can make environments.
RELAY_PYTHON ?= $(shell for python in $(PYTHON) python3.11 /usr/bin/python3.11; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)
# Optimum needs an older transformers than this project's.
MATRIX_INSTALLED := .venv-matrix/installed
MATRIX_FILES := artifacts/matrix
NO_RELAY := Relay is left out: its packages need a Python 3.11 with venv; RELAY_PYTHON=path names one

.PHONY: help demo quick test bench matrix relay picture absences docker-test lint clean

help:
	@echo "make demo    train, export, compile, check, compare, report (CORPUS=path/to.txt takes another text)"
	@echo "make quick   lint and the tests that are not marked slow"
	@echo "make test    lint and all tests"
	@echo "make bench   the benchmarks alone, by pytest-benchmark"
	@echo "make matrix  docs/support-matrix.md: files of other exporters, made, compiled and run (hours; WORKERS=4)"
	@echo "make relay   the environment of --frontend relay: TVM 0.17, in .venv-relay (needs Python 3.11)"
	@echo "make absences     tests with each optional thing absent (some need root)"
	@echo "make picture      docs/report.png of the report in artifacts, by headless Chromium"
	@echo "make docker-test  the CUDA image, built and run (as root; no docker engine, no GPU)"
	@echo "make lint    ruff: lint and format; mypy: types"
	@echo "make clean   remove .venv and artifacts"

# A change of a pin installs again; otherwise a second run installs nothing.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev,cuda,datasets,engines,gpt2,quantize,tensorboard,tune]"
	@touch $@

$(RELAY_INSTALLED): tvm_frontend/relay/requirements.txt
	@test -n "$(RELAY_PYTHON)" || { echo "$(NO_RELAY)"; exit 2; }
	$(RELAY_PYTHON) -m venv --clear .venv-relay
	.venv-relay/bin/python -m pip install --disable-pip-version-check --no-deps -r tvm_frontend/relay/requirements.txt
	@touch $@

$(MATRIX_INSTALLED): bench/studies/matrix-requirements.txt
	$(PYTHON) -m venv --clear .venv-matrix
	.venv-matrix/bin/python -m pip install --disable-pip-version-check -r bench/studies/matrix-requirements.txt
	@touch $@

# With Relay's rows beside Relax's where Relay's environment can be made.
demo: $(INSTALLED)
	$(if $(RELAY_PYTHON),@$(MAKE) --no-print-directory relay,@echo "$(NO_RELAY)")
	$(BIN)/python -m gpt.train demo --overwrite $(if $(CORPUS),--corpus "$(CORPUS)")
	$(BIN)/python -m export.onnx artifacts/ckpt.pt
	$(BIN)/python -m export.onnx artifacts/ckpt.pt --with-cache
	$(BIN)/python -m tvm_frontend.compile --opt-level 0
	$(BIN)/python -m tvm_frontend.compile
	$(BIN)/python -m tvm_frontend.compile artifacts/model-cache.onnx
	$(BIN)/python -m bench

# One worker for each core, four at most, on one thread each; a worker that has run its tests takes over another's.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

quick: lint
	$(PYTEST) -q -m "not slow"

test: lint
	$(PYTEST)

bench: $(INSTALLED)
	$(BIN)/python -m pytest bench/ --benchmark-only

# Each step goes on where a run before it stopped.
matrix: $(INSTALLED) $(MATRIX_INSTALLED)
	$(BIN)/python -m bench.studies.foreign_files $(MATRIX_FILES) --with torch
	.venv-matrix/bin/python -m bench.studies.foreign_files $(MATRIX_FILES) --with optimum
	.venv-matrix/bin/python -m bench.studies.foreign_files $(MATRIX_FILES) --with tools
	$(BIN)/python -m bench.support $(MATRIX_FILES) $(if $(WORKERS),--workers $(WORKERS))

# Which make demo does too, where it can.
relay: $(RELAY_INSTALLED)

# The README's picture, of the report that is in artifacts.
picture:
	@command -v chromium >/dev/null || { echo "make picture: no chromium on PATH (on Debian: apt-get install chromium)"; exit 2; }
	@test -f artifacts/report.html || { echo "make picture: no artifacts/report.html; make it with: make demo"; exit 2; }
	chromium --headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync \
		--user-data-dir=artifacts/.chromium --hide-scrollbars --window-size=1100,1250 \
		--screenshot=artifacts/report.png artifacts/report.html
	rm -rf artifacts/.chromium
	mv artifacts/report.png docs/report.png

# What touches something optional, run without it: it passes, or skips with a reason.
absences: $(INSTALLED)
	$(BIN)/python tests/absences.py

# Some minutes and GB: see docker/README.md.
docker-test: $(INSTALLED)
	$(BIN)/python -m pytest docker/test_image.py -s --timeout 1800

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-relay .venv-matrix artifacts
