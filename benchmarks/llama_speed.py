"""Speed and memory in llama.cpp: an original GGUF beside exports of its conversions, as ratios in one run.

    anymla convert SmolLM2-135M-Instruct -o q96 --target gguf --kv-rank 64 --rope-dims 32 --kv-cache 0.25
    anymla export q96 --to gguf --dtype q8_0 -o q96.gguf
    python benchmarks/llama_speed.py ORIGINAL.gguf q96.gguf/model.gguf ... --json llama_speed.json

Needs a Python with llama-cpp-python and nothing of anymla (tests/engines/install-llama.sh makes one). Speed does
not depend on what the numbers are: any conversion of the right shape does (--reconstruction-steps 0
--calibration-tokens 512 is quick). Flash attention is on, weights are repacked for neither.

Per file, cache type, context and batch: bytes of the cache per token, measured; tokens per second of prefill up to the
context, and of decode behind it, over those of the first file with an f16 cache; what attending to the context adds to
a decode step; multiply-adds per cached byte and query, which say whether memory or arithmetic is what it waits for.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from pathlib import Path
from typing import Any

try:
    import llama_cpp
except ModuleNotFoundError:  # --help does without
    llama_cpp = None

CACHES = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}  # bytes per number
BLOCKS = {"f16": 1, "q8_0": 32, "q4_0": 32}  # numbers that share a scale
UBATCH, CELL, SHORT, STEPS, ROUNDS = 512, 12, 32, 4, 3
QUIET = llama_cpp and llama_cpp.llama_log_callback(lambda level, text, data: None)


class Sequences:
    """Equal sequences in one context of a model."""

    def __init__(self, model: Any, cache: str, length: int, batch: int, threads: int) -> None:
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = (length + 64) * batch, UBATCH, UBATCH
        settings.n_seq_max, settings.kv_unified = batch, False
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k = settings.type_v = getattr(llama_cpp, f"GGML_TYPE_{cache.upper()}")
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context, self.batch, self.length = llama_cpp.llama_init_from_model(model, settings), batch, 0

    def decode(self, tokens: list[tuple[int, int]]) -> None:
        """(Position, sequence) pairs in one step; logits of the last of each sequence."""
        step = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        step.n_tokens = len(tokens)
        for at, (position, sequence) in enumerate(tokens):
            step.token[at], step.pos[at] = 100 + position % 1000, position
            step.n_seq_id[at], step.seq_id[at][0] = 1, sequence
            step.logits[at] = at == len(tokens) - 1 or tokens[at + 1][1] != sequence
        if llama_cpp.llama_decode(self.context, step):
            raise SystemExit("llama_decode failed")
        llama_cpp.llama_synchronize(self.context)
        llama_cpp.llama_batch_free(step)

    def prefill(self, length: int) -> float:
        """Seconds for ``length`` tokens of the first sequence, which the others then share."""
        started = time.perf_counter()
        for start in range(0, length, UBATCH):
            self.decode([(position, 0) for position in range(start, min(length, start + UBATCH))])
        seconds, self.length = time.perf_counter() - started, length
        for other in range(1, self.batch):
            llama_cpp.llama_memory_seq_cp(llama_cpp.llama_get_memory(self.context), 0, other, -1, -1)
        return seconds

    def step(self) -> float:
        """Seconds of a decode step of all sequences, the least of a few."""
        times = []
        for _ in range(STEPS * ROUNDS):
            started = time.perf_counter()
            self.decode([(self.length, sequence) for sequence in range(self.batch)])
            times.append(time.perf_counter() - started)
            self.length += 1
        return min(times)

    def bytes(self) -> float:
        """Per token, in all layers, as llama.cpp saves them."""
        return llama_cpp.llama_state_seq_get_size(self.context, 0) / self.length - CELL

    def close(self) -> None:
        """Frees the context."""
        llama_cpp.llama_free(self.context)


def number(model: Any, key: str) -> int:
    """A number of the file's metadata under the name of its architecture; 0 where it has none."""
    text = ctypes.create_string_buffer(64)
    llama_cpp.llama_model_meta_val_str(model, b"general.architecture", text, 64)
    found = llama_cpp.llama_model_meta_val_str(model, text.value + b"." + key.encode(), text, 64)
    return int(text.value) if found > 0 else 0


def key_length(model: Any) -> int:
    """Numbers of a head's key; of a latent and its rope key."""
    heads = llama_cpp.llama_model_n_head(model)
    return number(model, "attention.key_length") or llama_cpp.llama_model_n_embd(model) // heads


def intensity(model: Any, cache: str) -> float:
    """Multiply-adds per cached byte, per query: scores and the weighted sum."""
    heads, kv_heads = llama_cpp.llama_model_n_head(model), llama_cpp.llama_model_n_head_kv(model)
    d = key_length(model)
    value = number(model, "attention.value_length") or d
    numbers = d if number(model, "attention.kv_lora_rank") else kv_heads * (d + value)
    return heads * (d + value) / (numbers * CACHES[cache])


def measured(file: Path, cache: str, contexts: list[int], batches: list[int], threads: int) -> list[dict[str, Any]]:
    """One row per context and batch."""
    options = llama_cpp.llama_model_default_params()
    options.use_extra_bufts = False  # exports/gguf/run_llama_cpp.py says why
    model, rows = llama_cpp.llama_model_load_from_file(str(file).encode(), options), []
    name = file.parent.name if file.name == "model.gguf" else file.stem
    if (length := key_length(model)) % BLOCKS[cache]:
        print(f"{name} takes no {cache} cache: {length} numbers of a key, no multiple of {BLOCKS[cache]}", flush=True)
        llama_cpp.llama_model_free(model)
        return []
    for batch in batches:
        short = Sequences(model, cache, SHORT, batch, threads)
        short.prefill(SHORT)
        least = short.step()
        short.close()
        for context in contexts:
            sequences = Sequences(model, cache, context, batch, threads)
            prefill, step = sequences.prefill(context), sequences.step()
            rows.append(
                {
                    **{"file": name, "cache": cache, "context": context, "batch": batch},
                    "bytes_per_token": sequences.bytes(),
                    "prefill_per_s": context / prefill,
                    "decode_per_s": batch / step,
                    "context_ms": (step - least) * 1e3,
                    "multiply_adds_per_byte": intensity(model, cache),
                }
            )
            sequences.close()
    llama_cpp.llama_model_free(model)
    return rows


def line(row: dict[str, Any], first: dict[str, Any]) -> str:
    """A row of the table, beside that of the first file with the same context and batch."""
    ratios = [row[name] / first[name] for name in ("bytes_per_token", "prefill_per_s", "decode_per_s")]
    cells = [*(row[name] for name in ("file", "cache", "context", "batch"))]
    cells += [
        f"{row['bytes_per_token']:,.0f} ({ratios[0]:.1%})",
        f"{row['prefill_per_s']:.0f} ({ratios[1]:.2f})",
        f"{row['decode_per_s']:.1f} ({ratios[2]:.2f})",
    ]
    cells += [f"{row['context_ms']:.1f}", f"{row['multiply_adds_per_byte']:.1f}"]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="GGUF files; the first is the original")
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES))
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if llama_cpp is None:
        parser.error("this Python has no llama-cpp-python: tests/engines/install-llama.sh makes one that has it")
    llama_cpp.llama_log_set(QUIET, ctypes.c_void_p(0))
    print(
        "| file | cache | context | batch | bytes per token | prefill /s | decode /s | context, ms | operations / B |"
    )
    print("|---|---" + "|---:" * 7 + "|")
    rows: list[dict[str, Any]] = []
    for file in asked.files:
        for cache in asked.caches:
            rows += (added := measured(file, cache, asked.contexts, asked.batches, asked.threads))
            for row in added:
                same = [each for each in rows if (each["context"], each["batch"]) == (row["context"], row["batch"])]
                print(line(row, same[0]), flush=True)
    if asked.json is not None:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
