# make demo and make test need nothing but Python >= 3.10 with venv, and make.

PYTHON ?= python3
BIN := .venv/bin
SOURCES := diffusers_scalelong training tests benchmarks
DEMO := outputs/digits

.PHONY: install demo test test-slow stress style quality

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	    training/train_unconditional.py \
	    --dataset_name digits \
	    --model_config_name_or_path training/configs/digits_unet.json \
	    --skip_scaling cs --kappa 0.7 --seed 0 \
	    --output_dir $(DEMO) --overwrite_output_dir
	$(BIN)/python training/demo.py $(DEMO)

test: install
	$(BIN)/python -m pytest -n logical

test-slow: install
	$(BIN)/python -m pytest -n logical -m slow

# A training process is killed 100 times at random moments and must come out bit-identical.
stress: install
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 ACCELERATE_USE_CPU=true $(BIN)/python tests/stress.py --kills 100

style: install
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

quality: install
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
