# Needs Python 3.11 or newer (with its venv module), git and make. `make` lists the targets.
#
# The environment is made once and used again for as long as what it installs stays the same. VENV=DIR puts it
# elsewhere, PYTHON=PROGRAM makes it with another Python.

VENV ?= .venv
PYTHON ?=
EXTRAS := sglang,ray,dev

ifeq ($(strip $(VENV)),)
$(error VENV is empty: leave it out, or name a folder)
endif

# Recipes read these as shell variables ("$$VENV"), so that no name is ever parsed as shell code.
export VENV PYTHON EXTRAS
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.ONESHELL:
.SHELLFLAGS := -euc
.PHONY: help demo test models compat faults bench lint env env-key clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo   train a tiny model, push it as FP8 into a real SGLang server, prove that both agree'
	@echo 'make test   check style and types, then run all tests'
	@echo 'make models prove every model family in every layout, on servers of its own, and write docs/models.md'
	@echo 'make compat prove every supported SGLang release, each on servers of its own, and write docs/compat.md'
	@echo 'make faults stage every fault, without SGLang and on real servers, and write docs/faults.md'
	@echo 'make bench  time pushes beside the weight updates that SGLang has on board, on a CPU'
	@echo 'make lint   style and types only'
	@echo 'make env    make or update the environment (11 GB, about 3 minutes); the others do it too'
	@echo 'make clean  remove caches and outputs; the environment stays'

demo: env
	@"$$VENV/bin/python" -m examples.demo

test: lint
	@echo '== tests'
	"$$VENV/bin/python" -m pytest

models: env
	@mkdir -p out
	status=0
	"$$VENV/bin/python" -m pytest tests/test_models.py tests/test_models_in_process.py -m '' -W ignore \
	    --junitxml=out/models.xml -o junit_family=xunit1 || status=$$?
	"$$VENV/bin/python" -m tests.models_table out/models.xml > out/models.md
	mv out/models.md docs/models.md
	exit "$$status"

compat: env
	@"$$VENV/bin/python" -m tests.compat.run

bench: env
	@"$$VENV/bin/python" -m benchmarks.stock

faults: env
	@mkdir -p out
	rm -f out/faults.xml
	status=0
	"$$VENV/bin/python" -m pytest tests/faults/test_real.py -m faults -W ignore \
	    --junitxml=out/faults.xml -o junit_family=xunit1 || status=$$?
	"$$VENV/bin/python" -m tests.faults --real out/faults.xml --document out/faults.md 2>out/faults.log || status=$$?
	mv out/faults.md docs/faults.md
	exit "$$status"

lint: env
	@echo '== style'
	"$$VENV/bin/python" -m ruff check .
	"$$VENV/bin/python" -m ruff format --check .
	echo '== types'
	"$$VENV/bin/python" -m mypy --cache-dir "$$VENV/.mypy_cache"  # that torch was read is remembered for other clones

clean:
	@rm -rf build dist out .cache .pytest_cache .mypy_cache .ruff_cache ./*.egg-info
	for folder in sender receiver_plugin shared tests examples benchmarks; do
	    [ ! -d "$$folder" ] || find "$$folder" -name __pycache__ -type d -prune -exec rm -rf {} +
	done
	echo "The environment stays; to remove it too: rm -rf $$VENV"

# What the environment holds, as one word: the requirements, their versions and the Python. Tool settings do not count.
define KEY_SCRIPT
import hashlib, os, pathlib, platform, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
parts = [project["dependencies"], project["optional-dependencies"], os.environ["EXTRAS"], platform.machine()]
parts += [pathlib.Path("requirements/ci.txt").read_text(encoding="utf-8"), platform.python_version_tuple()[:2]]
print(hashlib.sha256(repr(parts).encode()).hexdigest()[:16])
endef

# Where the editable install points to and what its metadata says; several clones can take turns with one environment.
define LINK_SCRIPT
import hashlib, pathlib
print(hashlib.sha256(pathlib.Path("pyproject.toml").read_bytes()).hexdigest()[:16], pathlib.Path.cwd().resolve())
endef

define FIND_PYTHON
for python in $${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    ! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || break
    python=
done
[ -n "$$python" ] || { echo 'Python 3.11 or newer is needed: make ... PYTHON=/path/to/it' >&2; exit 1; }
endef
export KEY_SCRIPT LINK_SCRIPT

env-key:
	@$(FIND_PYTHON)
	"$$python" -c "$$KEY_SCRIPT"

# .fp8sync-own    the folder was made here, so it may be removed; one that somebody else made is only added to
# .fp8sync-KEY    written last: the environment is whole
# .fp8sync-link   the clone that it runs
env:
	@$(FIND_PYTHON)
	stamp="$$VENV/.fp8sync-$$("$$python" -c "$$KEY_SCRIPT")"
	link="$$("$$python" -c "$$LINK_SCRIPT")"
	if [ ! -e "$$stamp" ] || ! "$$VENV/bin/python" -c '' 2>/dev/null; then
	    echo "== setting up $$VENV: about 3 minutes and 11 GB"
	    [ ! -e "$$VENV/.fp8sync-own" ] || rm -rf "$$VENV"
	    if [ ! -e "$$VENV" ] || [ -z "$$(ls -A "$$VENV")" ]; then
	        mkdir -p "$$VENV"
	        touch "$$VENV/.fp8sync-own"
	        "$$python" -m venv "$$VENV" || { echo 'Python lacks its venv module (Debian: python3-venv)' >&2; exit 1; }
	    fi
	    [ -x "$$VENV/bin/python" ] || { echo "$$VENV is no virtual environment: name another VENV" >&2; exit 1; }
	    rm -f "$$VENV"/.fp8sync-????????????????
	    "$$VENV/bin/python" -m pip install -q -c requirements/ci.txt -e ".[$$EXTRAS]"
	    echo "$$link" > "$$VENV/.fp8sync-link"
	    touch "$$stamp"
	elif [ "$$link" != "$$(cat "$$VENV/.fp8sync-link" 2>/dev/null)" ]; then
	    echo "== pointing $$VENV to this clone"
	    "$$VENV/bin/python" -m pip install -q --no-deps --no-build-isolation -e .
	    echo "$$link" > "$$VENV/.fp8sync-link"
	fi
