# What a user runs: `make demo`, `make test`, `make serve`. Everything they need, `make setup` installs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export PYTHONPATH :=
export TOKENIZERS_PARALLELISM := false

.PHONY: setup chain-tools browser-tools contracts contracts-audit demo network-demo serve test test-vllm soak bench bench-peers clean

KERNELS := backends/openlora_python/openlora/engine/kernels

setup: $(VENV)/installed $(KERNELS)/native.so

# torch first and by itself, so that nothing pulls another build of it.
$(VENV)/installed: requirements.lock pyproject.toml build_scripts/setup.sh
	PYTHON="$(PYTHON)" bash build_scripts/setup.sh $(VENV)

# For this CPU. Without a compiler everything works, but several times slower: the engine says so when it starts.
$(KERNELS)/native.so: $(wildcard $(KERNELS)/*.cpp $(KERNELS)/*.h) $(KERNELS)/build.py $(VENV)/installed
	$(BIN)/python -m openlora.engine.kernels.build || echo "setup: without native kernels" >&2

# Compiler, local chain and test runner of the contracts, from npm.
chain-tools: contracts/node_modules/installed

contracts/node_modules/installed: contracts/package.json contracts/package-lock.json build_scripts/chain_tools.sh
	bash build_scripts/chain_tools.sh

contracts: chain-tools
	cd contracts && node build.mjs && npx --no-install forge test

# Static analysis, in an environment of its own: its pins exclude ours.
contracts-audit: chain-tools .venv-slither/installed
	cd contracts && PATH="$(CURDIR)/contracts/node_modules/.bin:$$PATH" ../.venv-slither/bin/slither .

.venv-slither/installed: contracts/slither-requirements.txt
	$(PYTHON) -m venv .venv-slither
	.venv-slither/bin/python -m pip --disable-pip-version-check install --quiet --no-input --requirement $<
	touch $@

# A browser, its driver from npm, and the packages that the page's vendored files come from.
browser-tools: tests/browser/node_modules/installed

tests/browser/node_modules/installed: tests/browser/package.json tests/browser/package-lock.json build_scripts/browser_tools.sh
	bash build_scripts/browser_tools.sh

demo: setup
	$(BIN)/python build_scripts/make_demo.py --out var/demo
	$(BIN)/python build_scripts/run_demo.py

# A chain of this machine's own, and every step from a receipt to a reward on it.
network-demo: setup chain-tools
	$(BIN)/python build_scripts/make_demo.py --out var/demo
	$(BIN)/python build_scripts/run_network_demo.py

serve: setup
	$(BIN)/python build_scripts/make_demo.py --out var/demo
	$(BIN)/openlora serve --model var/demo/model --adapters var/demo/adapters

test: setup chain-tools browser-tools
	$(BIN)/python build_scripts/make_demo.py --out var/demo
	$(BIN)/python build_scripts/get_perf_analyzer.py --out var/tools
	$(BIN)/python build_scripts/get_helm.py --out var/tools
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -m "not soak"

# vLLM for the CPU in an environment of its own (3.4 GB), and the tests that need it; `make test` skips them without it.
test-vllm: setup
	$(BIN)/python build_scripts/make_demo.py --out var/demo
	$(BIN)/python benchmarks/peers/environments.py var/peers/vllm
	$(BIN)/python -m pytest -k vllm tests/test_engine_protocol.py tests/test_engines_live.py

soak: setup chain-tools
	$(BIN)/python build_scripts/make_demo.py --out var/demo
	$(BIN)/python -m pytest -m soak -s

bench: bench-peers
	$(BIN)/python build_scripts/make_demo.py --out var/demo
	$(BIN)/openlora serve --model var/demo/model --adapters var/demo/adapters --detach
	$(BIN)/python benchmarks/serving.py --json var/bench.jsonl; status=$$?; $(BIN)/openlora stop; exit $$status

# Minutes, and an environment of its own for vLLM; what can't be installed here is named and left out.
bench-peers: setup
	$(BIN)/python benchmarks/peers/run.py --json var/peers.jsonl

# What the targets above make again. The rest of var stays: it is the state of `make serve`, with keys, journal and log.
clean:
	rm -rf $(VENV) .venv-slither contracts/node_modules tests/browser/node_modules contracts/out contracts/cache
	rm -rf $(KERNELS)/native.so $(addprefix var/,demo demo_shape network-demo peers residency receipts shape tools)
	@if [ -e var/keys ]; then echo "kept: var, the server's state (keys, journal, receipt log)"; fi
