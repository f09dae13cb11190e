# make demo   the whole program on drawn pictures, offline after installation, in about 4 minutes on two cores with bf16 units
# make photographs   what the network that comes with the project makes of 200 free photographs
# make test   the checks
# make soak   the long checks of docs/reliability.md, 25 to 50 minutes on two cores
# make clean  removes the demo's pictures and weights; runs in assets/logs stay
export PATH := $(CURDIR)/.venv/bin:$(PATH)
PYTHON ?= python3
SHAPES := examples/shapes
PHOTOGRAPH := examples/photographs/free/n02167151/9a1c67f467b9beea.jpg

.PHONY: demo photographs test soak lint clean tiny
.NOTPARALLEL:

demo: .venv/installed
	python $(SHAPES)/draw.py
	python img_sampler_train.py --link --parameters $(SHAPES)/parameters.json
	python img_sampler_val.py --link --parameters $(SHAPES)/parameters.json
	python examples/train_classifier.py --parameters $(SHAPES)/parameters.json --epochs 5 --learning-rate 0.2 \
		--label-smoothing 0.1 --set training.precision=float32
	python train_darionet.py --parameters $(SHAPES)/pixels.json
	python train_darionet.py --parameters $(SHAPES)/parameters.json
	python test.py --parameters $(SHAPES)/parameters.json
	python try_darionet.py --parameters $(SHAPES)/parameters.json $(SHAPES)/data/val_original/rings/0000.png
	python try_darionet.py --parameters examples/photographs/parameters.json $(PHOTOGRAPH)
	@echo
	@echo "Drawn pictures, table and figures: $$(ls -d assets/logs/test_* | tail -n 1)/results.md, table.png, triptychs.png"
	@echo "A photograph, read by an ImageNet classifier: $$(ls -d assets/logs/try_* | tail -n 1)/classification.png, scales.png"

photographs: .venv/installed
	python test.py --parameters examples/photographs/parameters.json

# Two processes of one thread each: on two cores the same work in less than half the time. make test THREADS=2 changes it.
THREADS ?= 1
test: export OMP_NUM_THREADS = $(THREADS)
test: .venv/installed
	ruff check .
	ruff format --check .
	pytest -n 2 --dist worksteal

soak: export OMP_NUM_THREADS = 1
soak: .venv/installed
	python soak/killed.py 200
	python soak/signals.py
	python soak/torchrun.py
	SOAK=1 pytest tests/test_images.py tests/test_fuzz_parameters.py

lint: .venv/installed
	ruff format .
	ruff check --fix .

# The results table of examples/tiny_imagenet: make tiny ARCHIVE=tiny-imagenet-200.zip
tiny: .venv/installed
	examples/tiny_imagenet/run.sh $(ARCHIVE)

.venv/installed: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, as in: make PYTHON=python3.12 demo" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -qq --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(SHAPES)/data $(SHAPES)/output
