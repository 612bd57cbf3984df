# Every target makes its own environment first (setup.sh: a .venv, made once, remade when the pins change).
SHELL := /bin/bash
PYTHON_BIN := .venv/bin/python
export PYTHONPATH :=
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test lint bench gym verifiers trackers browser dashboards parity templates architectures faults siege nodes locks gpu gpu-wheels gpu-rehearsal

setup:
	@./setup.sh

demo: setup  ## SFT, a reward model and PPO on this machine's CPU; report in runs/demo/report.html
	@$(PYTHON_BIN) -m rlhf_ray demo $(if $(SEED),--seed $(SEED))

test: setup  ## everything that must hold, offline, on two cores: the rooms side by side, then the whole stack and vLLM's engines
	@$(PYTHON_BIN) -m tests.whole

lint: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports

gym: setup  ## what GRPO learns on a task of reasoning-gym, in one turn and in two; needs pip install reasoning-gym (KEEP=1 keeps the figures)
	@$(PYTHON_BIN) -m benchmarks.run --only gym,gym_turns $(if $(filter-out 0,$(KEEP)),--keep)

verifiers: setup  ## the worked example is played by verifiers 0.4.0 itself, in an environment of its own (build/verifiers)
	@test -x build/verifiers/bin/python || $(PYTHON_BIN) -m venv build/verifiers
	@build/verifiers/bin/python -m pip install -q verifiers==0.4.0
	@VERIFIERS_PYTHON=$(CURDIR)/build/verifiers/bin/python $(PYTHON_BIN) -m pytest -q -m long tests/environments/test_verifiers.py

browser: setup  ## pages in headless Chromium, Debian's or what is called so; playwright is put into build/browser
	@test -d build/browser || $(PYTHON_BIN) -m pip install -q --target build/browser playwright==1.65.*
	@BROWSER=1 $(PYTHON_BIN) -m pytest -q $$(grep -rl --include='test_*.py' 'browser import' tests)

dashboards: setup  ## Grafana's dashboards through its own types, in an environment of their own (build/grafana), which is downloaded
	@test -x build/grafana/bin/python || $(PYTHON_BIN) -m venv build/grafana
	@build/grafana/bin/python -m pip install -q 'grafana-foundation-sdk==1769699379!11.6.0'
	@GRAFANA_SDK_PYTHON=$(CURDIR)/build/grafana/bin/python $(PYTHON_BIN) -m pytest -q tests/monitoring/test_dashboard_round_trip.py

trackers: setup  ## wandb, MLflow and trackio themselves, in an environment of their own (build/trackers), which is downloaded
	@test -x build/trackers/bin/python || $(PYTHON_BIN) -m venv build/trackers
	@$(PYTHON_BIN) -c "import site; print(site.getsitepackages()[0])" > $$(build/trackers/bin/python -c "import site; print(site.getsitepackages()[0])")/project.pth
	@build/trackers/bin/python -m pip install -q -c requirements/cpu.txt $$($(PYTHON_BIN) -m tests.trackers.wanted)
	@TRACKERS_MUST_BE_THERE=1 build/trackers/bin/python -m pytest -q tests/trackers
	@build/trackers/bin/python -m tests.trackers.sick_servers

bench: setup  ## figures into benchmarks/results/latest.json (ONLY=part[,part]); KEEP=1: into the committed reference.json too
	@$(PYTHON_BIN) -m benchmarks.run $(if $(ONLY),--only $(ONLY)) $(if $(filter-out 0,$(KEEP)),--keep)

parity: setup  ## compare with independent implementations, each in an environment of its own
	@$(PYTHON_BIN) -m tests.parity.run
	@$(PYTHON_BIN) -m tests.parity.clients

templates: setup  ## ids of conversations over the chat templates of published packages, which are downloaded (PACKAGES=folder keeps them)
	@$(PYTHON_BIN) -m tests.parity.chat_templates $(if $(PACKAGES),--packages $(PACKAGES))

architectures: setup  ## try every architecture of transformers, and write the tables of docs/architectures.md
	@$(PYTHON_BIN) -m tests.architectures.table $(ONLY)

faults: setup  ## the long fault campaign; what has a valid verdict in the matrix is not run again (docs/reliability.md)
	@$(PYTHON_BIN) -m pytest -q -m long tests
	@$(PYTHON_BIN) -m tests.faults.storage
	@$(PYTHON_BIN) -m tests.faults.matrix
	@$(PYTHON_BIN) -m tests.faults.campaign
	@$(PYTHON_BIN) -m tests.faults.serving
	@$(PYTHON_BIN) -m tests.faults.endings
	@$(PYTHON_BIN) -m tests.faults.kills
	@$(PYTHON_BIN) -m tests.faults.groups
	@$(PYTHON_BIN) -m tests.faults.window_kills
	@$(PYTHON_BIN) -m tests.faults.stops
	@$(PYTHON_BIN) -m tests.faults.stops --grace 3
	@$(PYTHON_BIN) -m tests.faults.useful_time

nodes: setup  ## two machines made of namespaces on this one: ranks on both, a node that dies, a disk that is not shared; needs root
	@$(PYTHON_BIN) -m tests.nodes.run

siege: setup  ## a service under all that starves other callers, and under deaths of its model (SECONDS of each attack, SCORES)
	@$(PYTHON_BIN) -m tests.serving.siege $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SCORES),--scores $(SCORES))

locks: setup  ## whether the GPU set still resolves to its lock, requirements/gpu.txt (WRITE=1: make it anew); asks the package index
	@$(PYTHON_BIN) -m tests.locks.gpu $(if $(WRITE),--write)

gpu:  ## check and measure what needs a GPU, with the machine's own Python (GPU_PYTHON); says what it left out (RESULTS: file for the figures)
	@$(or $(GPU_PYTHON),python3) -m tests.gpu.run $(if $(RESULTS),--results $(RESULTS))

gpu-wheels: setup  ## download what a bare GPU machine lacks into build/gpu-wheels (GPU_VERSION of its Python)
	@$(PYTHON_BIN) -m tests.gpu.prepare $(if $(GPU_VERSION),--python $(GPU_VERSION))

gpu-rehearsal: setup  ## make gpu on the CPU, in an environment with a bare GPU machine's own versions, which is downloaded (GPU_PYTHON makes it)
	@$(PYTHON_BIN) -m tests.gpu.rehearse $(if $(GPU_PYTHON),--python $(GPU_PYTHON))
