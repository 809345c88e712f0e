# Each target sets up what it needs and can be run again. `make` alone lists them.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: help demo test bench docker-test lint clean

help:
	@echo "make demo    train, export, compile, check, compare, report (CORPUS=path/to.txt takes another text)"
	@echo "make test    lint and tests"
	@echo "make bench   the benchmarks alone, by pytest-benchmark"
	@echo "make docker-test  the CUDA image, built and run (as root; no docker engine, no GPU)"
	@echo "make lint    ruff: lint and format"
	@echo "make clean   remove .venv and artifacts"

# A change of a pin installs again; otherwise a second run installs nothing.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev,cuda,datasets,quantize,tune]"
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python -m gpt.train demo --overwrite $(if $(CORPUS),--corpus "$(CORPUS)")
	$(BIN)/python -m export.onnx artifacts/ckpt.pt
	$(BIN)/python -m export.onnx artifacts/ckpt.pt --with-cache
	$(BIN)/python -m tvm_frontend.compile --opt-level 0
	$(BIN)/python -m tvm_frontend.compile
	$(BIN)/python -m tvm_frontend.compile artifacts/model-cache.onnx
	$(BIN)/python -m bench

# A worker a core, four at most, each on one thread; who has done his part takes of another's.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

bench: $(INSTALLED)
	$(BIN)/python -m pytest bench/ --benchmark-only

# Some minutes and GB: see docker/README.md.
docker-test: $(INSTALLED)
	$(BIN)/python -m pytest docker/test_image.py -s --timeout 1800

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv artifacts
