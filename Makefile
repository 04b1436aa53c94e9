# The two commands of the README, and what they need.
#   make quickstart   set up, then text -> tokenizer -> training -> export -> sentences (TEXT=, TOKENIZER=, OUT=)
#   make test         set up, then the tests (15 minutes at most on 2 cores)
#   make test-all     also the long proofs

VENV := .venv
BIN := $(VENV)/bin
OUT := quickstart-run
# A file's tests share what they set up, so they stay in one process; files of few long tests do not wait for the end.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test test-all clean

quickstart: $(VENV)/.installed
	$(BIN)/python examples/quickstart/run.py --out "$(OUT)" $(if $(TEXT),--text "$(TEXT)") $(if $(TOKENIZER),--tokenizer "$(TOKENIZER)")

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest $(WORKERS)

# Installed once; again only when what is to be installed changes.
$(VENV)/.installed: setup.py pyproject.toml tools/make_venv.sh
	sh tools/make_venv.sh $(VENV)

clean:
	rm -rf $(VENV)
