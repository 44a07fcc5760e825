# The README's two commands. Each sets itself up on a bare machine and is safe to repeat.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYTHONSAFEPATH := 1
# Python compiles what it imports; compiling all of what is installed takes half a minute.
export PIP_NO_COMPILE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
RUNS := $(VENV)/.installed
TESTS := $(VENV)/.installed-tests

.PHONY: demo test lint types clean

demo: $(RUNS)
	$(BIN)/dit-accel demo --output outputs/demo

# One thread for each of the two processes: the tests' tensors are small, and threads would wait for each other.
test: $(TESTS) lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(TESTS)
	rm -rf build/types && mkdir -p build/types
	cp -r dit_accel build/types/dit_accel
	cp -r kernels pipelines calibration build/types/dit_accel/
	cd build/types && $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) -p dit_accel

$(RUNS): pyproject.toml constraints.txt
	$(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet -e . -c constraints.txt
	touch $(RUNS)

$(TESTS): $(RUNS)
	$(BIN)/python -m pip install --quiet -e '.[dev,peers]' -c constraints.txt
	touch $(TESTS)

clean:
	rm -rf $(VENV) build *.egg-info
