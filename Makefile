# Everything runs in .venv, which holds exactly what requirements.lock says. Another Python: make PYTHON=python3.12 env

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
UV := $(shell command -v uv 2>/dev/null)
DEMO := $(CURDIR)/out/demo
FAMILY := ip2p/postcards/weights
CORPUS := build/edit_corpus

.DEFAULT_GOAL := help
.PHONY: help env demo demo-s3 test test-unit lint bench weights clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(STAMP)  ## .venv with the pinned packages; done again only when the pins change

# uv only saves time: pip checks the same hashes.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=... env")'
	$(PYTHON) -m venv .venv
ifneq ($(UV),)
	uv pip install --python $(BIN)/python --require-hashes --no-deps -r requirements.lock
else
	$(BIN)/python -m pip install --require-hashes --no-deps -r requirements.lock
endif
	$(BIN)/python -m pip install --no-deps --no-build-isolation --no-index --quiet --editable .
	@touch $@

demo: $(STAMP)  ## pairs from a private Ray, a few training steps on them, an edit with the shipped model
	$(BIN)/python -m cluster.local run -- ray job submit --working-dir . -- \
		python jobs/datagen.py --recipe postcard --prompts 24 --output "$(DEMO)"
	$(BIN)/python jobs/train.py --pairs "$(DEMO)" --output "$(DEMO)-training" --cache-latents \
		--set steps=40 --set checkpoint_every=20 --set warmup=5 --report-every 10
	$(BIN)/python -m ip2p postcard --seed 5 --output "$(DEMO)/postcard.png"
	$(BIN)/python -m ip2p edit --input "$(DEMO)/postcard.png" --edit "make it night" --seed 0 --quiet \
		--output "$(DEMO)/edited.png" --compare "$(DEMO)/before_after.png"
	@echo "look at:" && ls "$(DEMO)/contact_sheet.png" "$(DEMO)/before_after.png"
	@ls "$(DEMO)-training/grids/"* 2>/dev/null || true  # none where no pair fell to the val split

demo-s3: $(STAMP)  ## a real S3 server, postcards into it, batch edits from it and back into it, their contact sheet
	mkdir -p "$(DEMO)-s3"
	$(BIN)/python -m cluster.local_s3 run -- sh -ec '\
		"$(BIN)/python" -m ip2p postcard --seed 0 --manifest 24 --output s3://demo/in; \
		"$(BIN)/python" jobs/batch_edit.py --manifest s3://demo/in/edits.jsonl --output s3://demo/edited \
			--sheet "$(DEMO)-s3/contact_sheet.png"; \
		"$(BIN)/python" -m ip2p batch-edit status s3://demo/edited'
	@echo "look at:" && ls "$(DEMO)-s3/contact_sheet.png"

test: $(STAMP)  ## all tests: the library, then Ray and real servers
	$(BIN)/python -m pytest tests/unit
	$(BIN)/python -m pytest $(wildcard tests/ray tests/service)

test-unit: $(STAMP)  ## the library's tests, without Ray
	$(BIN)/python -m pytest tests/unit

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## the measurements behind the documented numbers
	set -e; for name in datagen postcard_pictures postcard_pairs; do $(BIN)/python bench/$$name.py; done

weights: $(STAMP)  ## train the shipped model family again from its own pixels (hours)
	$(BIN)/python jobs/pretrain.py --output $(FAMILY)
	$(BIN)/python -m ip2p postcard --quiet --seed 101 --triplets 30000 --pictures --output $(CORPUS)/edits.jsonl
	$(BIN)/python jobs/datagen.py --recipe postcard-corpus --triplets $(CORPUS)/edits.jsonl --prompts 30000 \
		--output $(CORPUS)/edits
	rm -rf $(CORPUS)/back
	$(BIN)/python -m ip2p invert --input $(CORPUS)/edits --triplets $(CORPUS)/edits.jsonl --output $(CORPUS)/back
	rm -rf $(CORPUS)/drawn
	$(BIN)/python -m ip2p postcard --quiet --seed 0 --restorations 60000 --output $(CORPUS)/drawn
	$(BIN)/python jobs/train.py --pairs $(CORPUS)/drawn --cache-latents --set flip=0 --set steps=4000 \
		--set learning_rate=6e-4 --output $(CORPUS)/copying
	$(BIN)/python jobs/train.py --pairs $(CORPUS)/edits $(CORPUS)/back --cache-latents \
		--set base=$(CORPUS)/copying/model --set steps=8000 --set learning_rate=5e-4 \
		--export-dtype float16 --output $(CORPUS)/training
	$(BIN)/python jobs/pretrain.py --stages edit_model --edit-model $(CORPUS)/training/model --output $(FAMILY)

clean:  ## caches; not .venv, build/ or out/
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
