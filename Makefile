# make demo    what the embedded models draw, on one page; ends with its path and that of a picture of it
#              (ARGS="--family pixart 'red apple'" for one family and prompts of yours)
# make serve   ComfyUI with this package at http://127.0.0.1:8188 (ARGS="--listen 0.0.0.0 --port 8200")
# make test    everything, a process to each core (ARGS="-k layering -x" for a part of it, "-n 0" for one process)
# make bench   drawing and training of every family against ComfyUI, diffusers, peft and plain loops of the releases, at
#              small sizes on the CPU (ARGS="--case pixart" for a part, "--list" for the names, "--write" for the table in
#              benchmarks/README.md); GPU=1 for released sizes in bf16 on CUDA, in nine minutes (ARGS="--minutes 20")
# make count   launches, bytes, casts, waits, FLOPs and peak memory of a step of every network beside ComfyUI's and
#              diffusers', without a GPU (ARGS="PixArt --operations" for where they are, "--write" for benchmarks/counts.md)
#
# Each works from a fresh clone: the first run fetches a ComfyUI and fills .venv with what it requires.
# COMFYUI_PATH  another ComfyUI; .venv is changed to what that one requires
# PYTHON        3.10 or newer
# TORCH         another torch, with the torchvision that goes with it in TORCHVISION
# VENV_ARGS     --system-site-packages keeps a torch that PYTHON already has, if TORCH admits it

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
VENV_ARGS ?=
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
READY := $(VENV)/ready
HOST := $(VENV)/host
FRONTEND := tests/frontend/node_modules/ready

.PHONY: demo serve test soak bench count clean always

demo: $(READY)
	$(RUN) -m pixstack.tools.demo $(ARGS)

serve: $(READY)
	$(RUN) tools/comfy_host.py serve $(ARGS)

# One thread in each process, for more would take the other processes' cores; a file's tests stay together, since what
# they share is made once per process. Eight processes are enough: each holds a ComfyUI of its own. Many tests start
# Python again, which would compile everything anew if nothing compiled were kept.
test: $(READY) $(FRONTEND)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN) -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

# Thousands of broken files, wrong inputs and faults, and a table of what became of them: 40 minutes on two cores.
soak: $(READY)
	$(RUN) tests/soak/soak.py $(ARGS)

bench: $(READY)
	$(RUN) benchmarks/suite.py $(if $(filter-out 0,$(GPU)),--gpu) $(ARGS)

count: $(READY)
	$(RUN) benchmarks/count.py $(ARGS)

clean:
	rm -rf $(VENV) .comfyui tests/artifacts tests/frontend/node_modules

# The ComfyUI that .venv was filled for: as new as the last time that COMFYUI_PATH changed.
$(HOST): always
	@mkdir -p $(@D)
	@echo "$(COMFYUI_PATH)" | cmp -s - $@ || echo "$(COMFYUI_PATH)" > $@

# torchvision goes in alone: its own requirement would replace a CPU torch or one that TORCH names.
$(READY): pyproject.toml Makefile $(HOST) $(if $(COMFYUI_PATH),$(wildcard $(COMFYUI_PATH)/requirements.txt))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"Python 3.10 or newer is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=...")'
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV_ARGS) $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) --no-deps "$(TORCHVISION)"
	$(RUN) tools/comfy_host.py requirements > $(VENV)/requirements.txt
	$(PIP) -r $(VENV)/requirements.txt -e ".[trainer,test]"
	@touch $@

# The frontend test drives Chromium through playwright-core. Without npm it skips, or fails where CI is set.
$(FRONTEND): tests/frontend/package.json tests/frontend/package-lock.json
	@if command -v npm >/dev/null; then npm ci --prefix tests/frontend --no-audit --no-fund --silent; \
	else mkdir -p $(@D); echo "npm is missing: the frontend test cannot run"; fi
	@touch $@
