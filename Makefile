# demo, test, bench, peers, reliability, coverage and lint work from a clean clone with only Python and a compiler: each creates .venv, installs a
# pinned torch and what else it needs, builds the kernels in place, and runs. A second run repeats only what changed.
PYTHON ?= python3
# pip takes the CPU or the CUDA build, as its index offers. Override: make test TORCH="torch --index-url URL"
TORCH ?= torch==2.13.0
# What the tests compare with; installed without dependencies, which would bring another torch.
TORCHVISION ?= torchvision==0.28.0
TIMM ?= timm==1.0.31
# What the tests interpret and compile ahead of time where torch (a CUDA build) brings no Triton of its own.
TRITON ?= triton==3.6.0

BIN := .venv/bin
SCOREBOARD := tests/test_reliability.py
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.py csrc/*/* csrc/*/*/*)

.PHONY: demo test bench peers reliability coverage lint clean FORCE

demo: .venv/built
	$(BIN)/python -m fastres demo

# Side by side, for machines of two cores: the kernels that are compiled and interpreted, and the scoreboard, whose output comes
# once the rest has ended, and the rest. One after the other where there is one core.
test: .venv/built .venv/dev
	@beside() { \
	  $(BIN)/python -m pytest tests -m compile && compiled=passed; \
	  TRITON_INTERPRET=1 $(BIN)/python -m pytest tests -m triton_interpreter && interpreted=passed; \
	  $(BIN)/python -m pytest $(SCOREBOARD) -m "not compile" && scoreboard=passed; \
	  echo "make test: compiled kernels $${compiled:-failed}, interpreted ones $${interpreted:-failed}, scoreboard $${scoreboard:-failed}"; \
	  test "$$compiled$$interpreted$$scoreboard" = passedpassedpassed; \
	}; \
	trap 'trap "" TERM; kill 0; exit 1' INT; \
	beside > .venv/beside.log 2>&1 & beside=$$!; \
	test "$$(nproc)" -gt 1 || { wait $$beside && these=passed; }; \
	$(BIN)/python -m pytest tests --ignore=$(SCOREBOARD) -m "not compile" && rest=passed; \
	echo "make test: waiting for the tests beside these"; \
	wait $$beside && these=passed; \
	cat .venv/beside.log; \
	echo "make test: tests of kernels and scoreboard $${these:-failed}, all others $${rest:-failed}"; \
	test "$$these$$rest" = passedpassed

bench: .venv/built .venv/dev
	$(BIN)/python -m pytest benchmarks --benchmark-only

# Against ONNX Runtime and OpenVINO too, some hundred megabytes more; takes about two hours.
peers: .venv/built .venv/peers
	$(BIN)/python -m benchmarks.peers

# Every class of the scoreboard in full; writes RELIABILITY.json, and what README and benchmarks/results/README.md show of it.
reliability: .venv/built .venv/dev
	PYTHONPATH=tests $(BIN)/python -m reliability
	$(BIN)/python -m benchmarks.report

# How much of the package the tests reach, by branches; one lane after the other, and about twice as long as they take.
coverage: .venv/built .venv/dev
	$(BIN)/coverage run --branch --source=fastres -m pytest tests
	TRITON_INTERPRET=1 $(BIN)/coverage run --append --branch --source=fastres -m pytest tests -m triton_interpreter
	$(BIN)/coverage report --skip-covered --fail-under=95

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv build fastres/*.so fastres/_build_info.json

# The torch asked for; rewritten, and so newer than what depends on it, only when TORCH changes.
.venv/wish: FORCE
	@mkdir -p .venv
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

.venv/torch: .venv/wish
	@$(PYTHON) -c 'import sys; sys.exit("fastres needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing $(TORCH); the first time it downloads some hundred megabytes."
	$(PIP) install -q $(TORCH)
	@touch $@

.venv/built: .venv/torch $(SOURCES)
	$(PIP) install -q "setuptools>=77" ninja pybind11
	$(BIN)/python setup.py -q build_ext --inplace
	$(PIP) install -q --no-build-isolation -e ".[demo]"
	@touch $@

.venv/peers: .venv/torch pyproject.toml | .venv/built
	$(PIP) install -q --no-build-isolation -e ".[bench]"
	@touch $@

.venv/dev: .venv/torch pyproject.toml | .venv/built
	$(PIP) install -q --no-build-isolation -e ".[dev]"
	$(PIP) install -q --no-deps $(TORCHVISION) $(TIMM)
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) install -q $(TRITON)
	@touch $@
