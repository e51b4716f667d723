# Two set-up commands: `make demo` and `make test`. Both need only Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Waiting threads sleep rather than spin: two processes on few cores would otherwise stall each other.
export OMP_WAIT_POLICY ?= PASSIVE
# Compiled modules are kept, whatever the environment says: each start would otherwise compile torch anew (11 s).
unexport PYTHONDONTWRITEBYTECODE
# Of pytest: a worker a core, the tests of a file by one of them.
ON_ALL_CORES := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-long check fast-test format bench bench-full faults hub hub-configs cards web docs release clean

demo: $(INSTALLED)  ## the shipped model on three real frames, then all twelve rows at smoke scale on synthetic ones
	@echo "== The shipped model on three real frames (PolypGen, CC BY 4.0; results in runs/demo/first-masks)"
	$(BIN)/polypseg segment "src/polypseg/sample_frames/*.jpg" --output runs/demo/first-masks
	@echo "== Training and testing the twelve rows at smoke scale on synthetic frames (results in runs/demo)"
	$(BIN)/polypseg study --scale smoke --workers 2 --output runs/demo

test: $(INSTALLED)  ## every test; those on real data run where ../shared/data or $$POLYPSEG_DATA is present
	@echo "== Running all tests"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ON_ALL_CORES) --max-worker-restart 0 --durations 20

test-long: $(INSTALLED)  ## the two tests that take minutes each: two nodes under Slurm's rules, WebGPU in software
	@echo "== Running the tests of minutes"
	POLYPSEG_LONG=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/study/test_full_study.py tests/hub/test_web_browser.py -k "two_nodes or webgpu"

check: $(INSTALLED)  ## format, lint, types, fast tests
	@echo "== Checking format, lint and types, then the fast tests"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) fast-test

fast-test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ON_ALL_CORES) -m "not slow and not real_data"

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED)  ## each job against the way before it, side by side; results in runs/bench
	@echo "== Timing each job against the way before it (results in runs/bench)"
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench.py --output runs/bench

bench-full: $(INSTALLED)  ## the same with full-size models, memory and how jobs grow: an hour
	@echo "== Timing each job against the way before it, full-size models too (results in runs/bench)"
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench.py --full --output runs/bench
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/peak_memory.py --output runs/bench
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/growth.py --output runs/bench

faults: $(INSTALLED)  ## kills, full disks, hostile inputs; results in docs/reliability.md
	@echo "== Trying every kind of fault (minutes; results in docs/reliability.md)"
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=tests:tests/study:tests/pretraining:tests/training \
		$(BIN)/python benchmarks/faults

hub: demo  ## the demo's models on a Hub of this machine, to try publishing and loading; Ctrl-C ends it
	@echo "== Publishing the demo's models to a Hub on this machine (data in runs/hub)"
	$(BIN)/python tests/hub_demo.py

cards: $(INSTALLED)  ## render model_cards from the table and the results
	$(BIN)/python training_scripts/render_cards.py

hub-configs: $(INSTALLED)  ## render hub_configs/models from the table
	$(BIN)/python training_scripts/render_hub_configs.py

docs: $(INSTALLED)  ## the site of docs/ in site/, every link checked
	@echo "== Building the site (open site/index.html)"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

release: $(INSTALLED) web  ## wheel and sdist of both distributions in dist/, tried in an empty environment; uploads nothing
	@echo "== Building both distributions into dist/"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[release]"
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m build --outdir dist packaging/polypseg
	$(BIN)/python -m twine check --strict dist/*
	@echo "== Trying the wheels in an empty environment"
	$(BIN)/python packaging/try_light.py --dist dist --frame src/polypseg/sample_frames/polypgen_1.jpg

web: src/polypseg/_web/build.json  ## build the browser page into the package; needs Node.js >= 20 with npm

src/polypseg/_web/build.json: $(wildcard web/src/* web/static/* web/third_party/* web/*.json web/*.mjs)
	@command -v npm >/dev/null || { echo "npm is missing: install Node.js >= 20 (https://nodejs.org)"; exit 2; }
	@echo "== Building the browser page into src/polypseg/_web"
	cd web && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error && npm run --silent check && npm run --silent build

$(INSTALLED): pyproject.toml constraints.txt
	@echo "== Installing polypseg and its tested dependencies into $(VENV) (once; several GB with torch)"
	$(PYTHON) -m venv $(VENV)
	@# Without --no-compile pip compiles 300 MB of source, of which a fifth is ever imported; Python does that by itself.
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(INSTALLED)

clean:
	rm -rf $(VENV) runs/demo .pytest_cache .mypy_cache .ruff_cache
