"""llama.cpp on one GGUF file, by any Python that has llama-cpp-python: a JSON object on stdin, one on stdout.

In:  model (a GGUF file), cache ("f32", "f16", "q8_0" or "q4_0"), n_batch (most tokens of a step), prompts (lists of
     ids), new (tokens to add to each, greedily), texts (to be tokenised), logits (a .npz file to write).
Out: tokens (the new ids of each prompt), text (of each prompt with them), ids (of each text), version (of
     llama-cpp-python), bytes (of each prompt's state before its first and after its last step, and how many tokens lie
     between).
All prompts are decoded together, each as a sequence of its own. The .npz file has an array [T,V] per prompt, the logits
at every position. Nothing of anymla is imported: a crash of llama.cpp stays in this process.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import llama_cpp
import numpy as np

TYPES = {name: getattr(llama_cpp, f"GGML_TYPE_{name.upper()}") for name in ("f32", "f16", "q8_0", "q4_0")}
ERROR = 4  # of llama.cpp's log levels


def log_errors(level: int, text: bytes, data: Any) -> None:
    """Passes on what went wrong, and nothing else."""
    if level == ERROR:
        sys.stderr.write(text.decode(errors="replace"))


LOG = llama_cpp.llama_log_callback(log_errors)  # must live as long as llama.cpp may call it


class Engine:
    """A model with a context of ``length`` tokens for ``sequences``, on one thread."""

    def __init__(self, path: str, cache: str, n_batch: int, sequences: int, length: int) -> None:
        llama_cpp.llama_log_set(LOG, ctypes.c_void_p(0))
        options = llama_cpp.llama_model_default_params()
        # On CPUs with AMX the llama.cpp of 0.3.36 packs f16 and q8_0 matrices so that products with permuted rows, as
        # deepseek2 has for attn_k_b, find no kernel (GGML_ASSERT in ggml-backend.cpp). llama-server: --no-repack.
        options.use_extra_bufts = False
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), options)
        if not self.model:
            raise SystemExit(f"llama.cpp did not load {path}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = length, n_batch, n_batch
        settings.n_seq_max, settings.kv_unified = sequences, True
        settings.n_threads = settings.n_threads_batch = 1
        settings.type_k = settings.type_v = TYPES[cache]
        # Sums of flash attention are float16, with any cache; quantised ones are read by nothing else.
        flash = "ENABLED" if cache.startswith("q") else "DISABLED"
        settings.flash_attn_type = getattr(llama_cpp, f"LLAMA_FLASH_ATTN_TYPE_{flash}")
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.n_batch, self.size = n_batch, llama_cpp.llama_vocab_n_tokens(self.vocab)

    def step(self, tokens: list[tuple[int, int, int]]) -> Any:
        """Logits [N,V] after each (token, position, sequence), at most ``n_batch`` of them at a time."""
        rows = []
        for start in range(0, len(tokens), self.n_batch):
            part = tokens[start : start + self.n_batch]
            batch = llama_cpp.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for at, (token, position, sequence) in enumerate(part):
                batch.token[at], batch.pos[at], batch.logits[at] = token, position, True
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
            if llama_cpp.llama_decode(self.context, batch):
                raise SystemExit("llama_decode failed")
            values = llama_cpp.llama_get_logits(self.context)
            rows.append(np.ctypeslib.as_array(values, (len(part), self.size)).copy())
            llama_cpp.llama_batch_free(batch)
        return np.concatenate(rows)

    def ids(self, text: str) -> list[int]:
        """The tokens of ``text``, special ones included."""
        raw = text.encode()
        found = (llama_cpp.llama_token * (len(raw) + 8))()
        count = llama_cpp.llama_tokenize(self.vocab, raw, len(raw), found, len(found), True, True)
        return list(found[:count])

    def text(self, ids: list[int]) -> str:
        """Returns what the tokens say."""
        buffer = ctypes.create_string_buffer(256 * len(ids))
        given = (llama_cpp.llama_token * len(ids))(*ids)
        count = llama_cpp.llama_detokenize(self.vocab, given, len(ids), buffer, len(buffer), False, False)
        return buffer.raw[:count].decode(errors="replace")

    def bytes(self, sequence: int) -> int:
        """The size of a sequence's saved state."""
        return int(llama_cpp.llama_state_seq_get_size(self.context, sequence))


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Answers one request."""
    prompts, new = request.get("prompts", []), request.get("new", 1)
    length = sum(len(prompt) + new for prompt in prompts) + 256
    sequences = max(1, len(prompts))
    engine = Engine(request["model"], request.get("cache", "f32"), request.get("n_batch", 512), sequences, length)
    answer: dict[str, Any] = {
        "version": llama_cpp.__version__,
        "ids": [engine.ids(text) for text in request.get("texts", [])],
    }
    if not prompts:
        return answer
    longest = range(max(map(len, prompts)))
    mixed = [(prompt[at], at, number) for at in longest for number, prompt in enumerate(prompts) if at < len(prompt)]
    logits: list[list[Any]] = [[] for _ in prompts]
    for (_, _, number), row in zip(mixed, engine.step(mixed), strict=True):
        logits[number].append(row)
    before = [engine.bytes(number) for number in range(len(prompts))]
    for _ in range(new - 1):
        step = [(int(own[-1].argmax()), len(own), number) for number, own in enumerate(logits)]
        for own, row in zip(logits, engine.step(step), strict=True):
            own.append(row)
    after = [engine.bytes(number) for number in range(len(prompts))]
    pairs = list(zip(prompts, logits, strict=True))
    tokens = [[int(row.argmax()) for row in own[len(prompt) - 1 :]] for prompt, own in pairs]
    np.savez(request["logits"], *[np.stack(own) for own in logits])
    return answer | {
        "tokens": tokens,
        "text": [engine.text(prompt + own) for prompt, own in zip(prompts, tokens, strict=True)],
        "bytes": [[first, last, new - 1] for first, last in zip(before, after, strict=True)],
    }


if __name__ == "__main__":
    json.dump(run(json.load(sys.stdin)), sys.stdout)
