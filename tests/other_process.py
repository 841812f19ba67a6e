"""Another Python that runs code for tests: without anymla, or to be forked. Its imports take seconds: one serves many.

    python -P tests/other_process.py [ABSENT]

Cannot import the package ABSENT. Reads one JSON object a line, code and the values of names. Answers with one line: the
code's ``answer``, or its error.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

LOGITS = """
import torch, transformers
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(**torch.load(inputs, weights_only=True)).logits, found)
if resaved:
    model.save_pretrained(resaved)
"""


class OtherProcess:
    """The process, seen from a test. It ends with the test's own."""

    def __init__(self, absent: str | None, environment: dict[str, str]) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        command = [sys.executable, "-P", str(Path(__file__).absolute()), *([] if absent is None else [absent])]
        self.process = subprocess.Popen(command, **pipes, text=True, cwd=Path(__file__).parent, env=environment)

    def run(self, code: str, **names: Any) -> Any:
        """Runs ``code`` with ``names``, and returns what it leaves as ``answer``."""
        self.process.stdin.write(json.dumps({"code": code, "names": names}) + "\n")
        self.process.stdin.flush()
        told = json.loads(self.process.stdout.readline())
        assert "error" not in told, told["error"]
        return told["answer"]


class WithoutAnymla(OtherProcess):
    """A Python that has no anymla, nor anything that this one has in its caches; ``place``: a folder of its own."""

    def __init__(self, place: Path) -> None:
        self.place = place
        super().__init__("anymla", {"HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"})

    def logits(
        self, folder: Path, inputs: dict[str, Any], *, auto: str = "AutoModelForCausalLM", resaved: Path | str = ""
    ) -> Any:
        """Logits of the model in ``folder``, which is also saved again to ``resaved``."""
        import torch

        torch.save(inputs, self.place / "inputs.pt")
        places = {"inputs": str(self.place / "inputs.pt"), "found": str(self.place / "logits.pt")}
        self.run(LOGITS, folder=str(folder), auto=auto, resaved=str(resaved), **places)
        return torch.load(self.place / "logits.pt", weights_only=True)


@functools.cache
def forking() -> OtherProcess:
    """A Python with one thread, which may fork, and has anymla."""
    return OtherProcess(None, os.environ | {"OMP_NUM_THREADS": "1"})


class Absent:
    """Finds no package of a name."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(name)


def answered(code: str, names: dict[str, Any]) -> dict[str, Any]:
    """What the code leaves, or how it failed."""
    try:
        exec(code, names)
        return {"answer": names.get("answer")}
    except BaseException:
        return {"error": traceback.format_exc()}


def main() -> None:
    absent = sys.argv[1:]
    sys.meta_path[:0] = map(Absent, absent)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed is no answer
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        told = answered(**json.loads(line))
        if found := [name for name in sys.modules if name.partition(".")[0] in absent]:
            told = {"error": f"{found} were imported"}
        answers.write(json.dumps(told) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
