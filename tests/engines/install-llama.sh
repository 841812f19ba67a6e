#!/usr/bin/env bash
# llama.cpp for the tests of tests/engines, in an environment of its own. Built from source once, about five minutes on two
# cores; done already where the marker file is there. CMAKE_BUILD_PARALLEL_LEVEL bounds the cores it takes.
set -euo pipefail
LLAMA_CPP_PYTHON=0.3.36
folder="${ANYMLA_ENGINES:-${XDG_CACHE_HOME:-$HOME/.cache}/anymla-engines}/llama"
made="$folder/made-$LLAMA_CPP_PYTHON"
[ -f "$made" ] && exit 0

rm -rf "$folder"
mkdir -p "$folder"
"${PYTHON:-python3}" -m venv "$folder"
# The bindings need libllama only. They switch llama.cpp's common library on by force; a variable set inside of its own
# project comes before that, and together with the vision library it is about half of what would be compiled.
echo 'set(LLAMA_BUILD_COMMON OFF)' >"$folder/no-common.cmake"
export CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}"
export CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_BLAS=OFF -DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama.cpp_INCLUDE=$folder/no-common.cmake"
"$folder/bin/pip" install --quiet --disable-pip-version-check --no-binary llama-cpp-python \
  "llama-cpp-python[server]==$LLAMA_CPP_PYTHON" numpy==2.4.6
"$folder/bin/python" -c 'import llama_cpp; llama_cpp.llama_backend_init()'
touch "$made"
