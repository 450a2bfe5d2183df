# Everything sets itself up: a virtual environment, the packages, the sample model and its bundle.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEVICE_VENV := .venv-device
NEXT_VENV := .venv-next
SAMPLE := build/sample
BUNDLE := build/bundle

.PHONY: help demo test test-next endurance images test-images lint types bench models clean

help:  ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 13

demo: models  ## a real answer across the link, in colour, then what drafting was worth
	@$(BIN)/edgedraft-bench demo --bundle $(BUNDLE) --target $(SAMPLE)

test: lint types models $(DEVICE_VENV)/ready  ## all tests, with the real sample model
	$(BIN)/pytest -q -n 2 --dist worksteal -m "not model and not endurance and not images"
	$(BIN)/pytest -q -m "model and not endurance"

endurance: models  ## runs of minutes: links broken, stations killed, hostile peers
	$(BIN)/pytest -q -m endurance

images:  ## the images, with docker or buildah
	docker/images.sh

test-images: models  ## images without a registry, built and run, for arm64 too; as root, with what docker/offline.sh needs
	docker/offline.sh $(BIN)/pip
	$(BIN)/pytest -q -rP -m images

test-next: models $(DEVICE_VENV)/ready $(NEXT_VENV)/ready  ## what touches the target model, on the newest transformers 5
	$(NEXT_VENV)/bin/pytest -q -m "not model and not endurance" tests/test_basestation_target_model.py tests/test_basestation_operation.py
	$(NEXT_VENV)/bin/pytest -q -m "model and not endurance" tests/test_model_answers.py tests/test_model_neighbours.py

lint: $(VENV)/ready  ## ruff and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/ready  ## mypy, strict
	$(BIN)/mypy

bench: models  ## the figures of the README
	$(BIN)/edgedraft-bench speedup --bundle $(BUNDLE) --target $(SAMPLE)
	$(BIN)/edgedraft-bench exact --bundle $(BUNDLE) --target $(SAMPLE)

models: $(BUNDLE)/manifest.json  ## the sample model and its bundle, under build/

clean:  ## forget environments and models
	rm -rf $(VENV) $(DEVICE_VENV) $(NEXT_VENV) build

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# What a device gets, and nothing else: its tests find out whether that is enough.
$(DEVICE_VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEVICE_VENV)
	$(DEVICE_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[device]'
	@touch $@

# Exporting needs transformers 4.57; the base station runs on 5 as well, with the newest of which this is filled.
$(NEXT_VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(NEXT_VENV)
	grep -vE '^(transformers|huggingface_hub|tokenizers|hf-xet)==' constraints.txt > $(NEXT_VENV)/constraints.txt
	$(NEXT_VENV)/bin/python -m pip install --quiet --constraint $(NEXT_VENV)/constraints.txt --editable '.[device,basestation]' \
		'transformers>=5,<6' hypothesis pytest pytest-timeout scipy
	@touch $@

$(SAMPLE)/config.json: | $(VENV)/ready
	$(BIN)/edgedraft-export sample $(SAMPLE)

$(BUNDLE)/manifest.json: $(SAMPLE)/config.json
	$(BIN)/edgedraft-export convert $(SAMPLE) $(BUNDLE)
