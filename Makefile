# The README's two commands. Each sets itself up on a bare machine and is safe to repeat.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYTHONSAFEPATH := 1
# Python compiles what it imports; compiling all of what is installed takes half a minute.
export PIP_NO_COMPILE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
STAMP := $(VENV)/.installed

.PHONY: demo test lint types clean

demo: $(STAMP)
	$(BIN)/dit-accel demo --output outputs/demo

# One thread for each of the two processes: the tests' tensors are small, and threads would wait for each other.
test: $(STAMP) lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	rm -rf build/types && mkdir -p build/types
	cp -r dit_accel build/types/dit_accel
	cp -r kernels pipelines calibration build/types/dit_accel/
	cd build/types && $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) -p dit_accel

$(STAMP): pyproject.toml constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet -e '.[dev,peers]' -c constraints.txt
	touch $(STAMP)

clean:
	rm -rf $(VENV) build outputs *.egg-info
