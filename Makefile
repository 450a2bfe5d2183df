# Every target creates what it needs: the virtual environment, the sample model and its bundle.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEVICE_VENV := .venv-device
NEXT_VENV := .venv-next
CLIENTS_VENV := .venv-clients
CLIENTS_NODE := build/clients
PEERS_NODE := build/peers
# Compiling all modules takes longer than compiling those that are imported.
PIP_OPTIONS := --quiet --no-compile
SAMPLE := build/sample
BUNDLE := build/bundle
PAIR := build/pair
PAIR_PROMPT := Write a Python class for a bank account with deposit, withdraw and a transaction history.
CUDA_TESTS := $(addprefix tests/test_basestation_,target_model.py varlen_attention.py quantized.py verify.py block_verification.py coupled.py non_finite.py prefix_sharing.py memory.py pass_graphs.py)
NEXT_TESTS := $(addprefix tests/test_,basestation_target_model.py basestation_supported_models.py basestation_memory.py model_answers.py)

# What targets need besides Python, as NAME=DEBIAN_PACKAGE.
needs-test := systemd-analyze=systemd
needs-test-images := debootstrap=debootstrap buildah=buildah qemu-aarch64-static=qemu-user-static \
	update-binfmts=binfmt-support sshd=openssh-server ssh=openssh-client shellcheck=shellcheck ip=iproute2 \
	systemd-analyze=systemd
needs-screenshots := chromium=chromium /usr/share/fonts/truetype/dejavu/DejaVuSans.ttf=fonts-dejavu-core
needs-test-pages := $(needs-screenshots) prometheus=prometheus
needs-test-clients := node=nodejs npm=npm
needs-peers := npm=npm
NEEDS := needs-test needs-test-images needs-screenshots needs-test-pages needs-test-clients needs-peers

.PHONY: $(NEEDS) locks help demo demo-pair test test-next test-cuda test-gguf test-pair test-clients test-schemas test-pages screenshots endurance images test-images lint types bench peers models pair bridge clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 13

demo: models  ## stream an answer over loopback, then compare with the target alone
	@$(BIN)/edgedraft-bench demo --bundle $(BUNDLE) --target $(SAMPLE)

demo-pair: pair  ## the same with a draft model of 0.5 and a target of 1.5 billion parameters, on a coding prompt
	@$(BIN)/edgedraft-bench demo --bundle $(PAIR)/bundle --target $(PAIR)/target --prompt "$(PAIR_PROMPT)"

test: needs-test lint types models $(DEVICE_VENV)/ready  ## lint, type checks and all tests, with the sample model
	$(BIN)/pytest -q -n 2 --dist worksteal -m "not model and not endurance and not images and not gguf and not pages and not pair"
	$(BIN)/pytest -q -n 2 --dist loadfile -m "model and not endurance and not clients and not pages"

endurance: models  ## tests that take minutes: broken links, killed base stations, hostile peers
	$(BIN)/pytest -q -m endurance

images:  ## build the container images with docker or buildah
	docker/images.sh

test-images: needs-test-images models  ## build the images without a registry and test them; needs root
	docker/offline.sh $(BIN)/pip
	$(BIN)/pytest -q -rP -m images

test-next: models $(DEVICE_VENV)/ready $(NEXT_VENV)/ready  ## the target model's tests on the newest transformers 5
	$(NEXT_VENV)/bin/python -m pytest -q -n 2 --dist worksteal -m "not endurance" $(NEXT_TESTS)

test-cuda: $(VENV)/ready  ## the target's tests on a GPU
	$(BIN)/pytest -q -p tests.on_cuda -m "not model and not endurance" $(CUDA_TESTS)

test-gguf: $(VENV)/ready  ## download two real GGUF files (700 MB) and test their import; takes about 10 minutes
	$(BIN)/python -m tests.gguf_models
	$(BIN)/pytest -q -m gguf

test-pair: needs-test-clients pair bridge $(CLIENTS_VENV)/ready $(CLIENTS_NODE)/ready  ## all tests of the pair, with clients of the API too; needs node, 16 GB of memory and hours
	$(BIN)/pytest -q -rP -m pair

test-clients: needs-test-clients models $(CLIENTS_VENV)/ready $(CLIENTS_NODE)/ready  ## run clients of the API, in Python and Node, against a pair; needs node
	$(BIN)/pytest -q -m clients

test-schemas: models  ## 200 JSON schemas on the sample model; takes about 40 minutes
	$(BIN)/pytest -q -rP -m endurance tests/test_model_schemas.py

test-pages: needs-test-pages models  ## drive the web pages in Chromium and scrape both ends with Prometheus, from Debian
	$(BIN)/pytest -q -m pages

screenshots: needs-screenshots models  ## take the pictures of the docs
	$(BIN)/python -m tests.screenshots docs/pictures

$(NEEDS):
	@tests/needs.sh $($@)

locks: $(VENV)/ready  ## write docker/locks: versions and hashes of all that images contain
	PIP=$(BIN)/pip UV=$(BIN)/uv docker/lock.sh

lint: $(VENV)/ready  ## ruff and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/ready  ## mypy --strict
	$(BIN)/mypy

bench: models  ## measure the sample pair's speedup, and check exactness
	$(BIN)/edgedraft-bench speedup --bundle $(BUNDLE) --target $(SAMPLE)
	$(BIN)/edgedraft-bench exact --bundle $(BUNDLE) --target $(SAMPLE)

peers: needs-peers $(PEERS_NODE)/ready  ## install llama.cpp for Node, which `edgedraft-bench peers` compares; needs npm

models: $(BUNDLE)/manifest.json  ## download the sample model and export its bundle into build/

pair: $(PAIR)/bundle/manifest.json  ## download a real pair (1.6 GB) and export its bundle into build/pair; needs 12 GB of memory

bridge: $(PAIR)/bridge/manifest.json  ## export the sample model as a draft model for the pair's target, whose vocabulary is another

clean:  ## delete the environments and build/
	rm -rf $(VENV) $(DEVICE_VENV) $(NEXT_VENV) $(CLIENTS_VENV) build

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_OPTIONS) --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The device extra alone; a test runs the device in this environment.
$(DEVICE_VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEVICE_VENV)
	$(DEVICE_VENV)/bin/python -m pip install $(PIP_OPTIONS) --constraint constraints.txt --editable '.[device]'
	@touch $@

# The export needs transformers 4.57; this environment tests the base station on the newest transformers 5. What
# transformers 5 does not replace comes from the first environment, which lies behind this one in sys.path.
$(NEXT_VENV)/ready: $(VENV)/ready
	$(PYTHON) -m venv $(NEXT_VENV)
	grep -vE '^(transformers|huggingface_hub|tokenizers|hf-xet)==' constraints.txt > $(NEXT_VENV)/constraints.txt
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(NEXT_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first.pth
	$(NEXT_VENV)/bin/python -m pip install $(PIP_OPTIONS) --constraint $(NEXT_VENV)/constraints.txt \
		--editable '.[device,basestation]' 'transformers>=5,<6'
	@touch $@

# The clients have environments of their own, without edgedraft.
$(CLIENTS_VENV)/ready: tests/clients/requirements.txt
	$(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip install --quiet --requirement $<
	@touch $@

$(CLIENTS_NODE)/ready: tests/clients/package.json
	mkdir -p $(CLIENTS_NODE)
	cp $< $(CLIENTS_NODE)
	npm install --silent --no-audit --no-fund --prefix $(CLIENTS_NODE)
	@touch $@

# Only the library for x86-64 without a GPU: the optional packages are those of all systems, 700 MB.
$(PEERS_NODE)/ready: bench/pair/package.json
	mkdir -p $(PEERS_NODE)
	cp $< $(PEERS_NODE)
	npm install --silent --no-audit --no-fund --ignore-scripts --omit=optional --prefix $(PEERS_NODE)
	@touch $@

$(SAMPLE)/config.json: | $(VENV)/ready
	$(BIN)/edgedraft-export sample $(SAMPLE)

$(BUNDLE)/manifest.json: $(SAMPLE)/config.json
	$(BIN)/edgedraft-export convert $(SAMPLE) $(BUNDLE) --precision int8

$(PAIR)/draft/config.json: | $(VENV)/ready
	$(BIN)/edgedraft-export sample $(@D) --model qwen2.5-coder-0.5b

$(PAIR)/target/config.json: | $(VENV)/ready
	$(BIN)/edgedraft-export sample $(@D) --model qwen2.5-coder-1.5b

$(PAIR)/bundle/manifest.json: $(PAIR)/draft/config.json $(PAIR)/target/config.json
	$(BIN)/edgedraft-export convert $(PAIR)/draft $(PAIR)/bundle --target $(PAIR)/target

$(PAIR)/bridge/manifest.json: $(SAMPLE)/config.json $(PAIR)/target/config.json
	$(BIN)/edgedraft-export convert $(SAMPLE) $(@D) --target $(PAIR)/target --precision int8
