# Everything sets itself up: a virtual environment, the packages, the sample model and its bundle.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEVICE_VENV := .venv-device
SAMPLE := build/sample
BUNDLE := build/bundle

.PHONY: help demo test images test-images lint types bench models clean

help:  ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 13

demo: models  ## a real answer across the link, in colour, then what drafting was worth
	@$(BIN)/edgedraft-bench demo --bundle $(BUNDLE) --target $(SAMPLE)

test: lint types models $(DEVICE_VENV)/ready  ## all tests, with the real sample model
	$(BIN)/pytest -q -n 2 --dist worksteal -m "not model and not images"
	$(BIN)/pytest -q -m model

images:  ## the images, with docker or buildah
	docker/images.sh

test-images: models  ## images without a registry, built and run, for arm64 too; as root, with what docker/offline.sh needs
	docker/offline.sh $(BIN)/pip
	$(BIN)/pytest -q -rP -m images

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
	rm -rf $(VENV) $(DEVICE_VENV) build

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# What a device gets, and nothing else: its tests find out whether that is enough.
$(DEVICE_VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEVICE_VENV)
	$(DEVICE_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[device]'
	@touch $@

$(SAMPLE)/config.json: | $(VENV)/ready
	$(BIN)/edgedraft-export sample $(SAMPLE)

$(BUNDLE)/manifest.json: $(SAMPLE)/config.json
	$(BIN)/edgedraft-export convert $(SAMPLE) $(BUNDLE)
