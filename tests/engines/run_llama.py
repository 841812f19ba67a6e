"""Runs llama.cpp in its own environment: a JSON object on stdin, one on stdout. Imports nothing of anymla.

In:  model (a GGUF file), cache ("f16" or "f32"), n_batch (tokens of one step), prompts (lists of ids), new (tokens to
     add to each, greedily), texts (to be tokenised), logits (a .npz file to write).
Out: tokens (the new ids of each prompt), text (of each whole answer), ids (of each text), bytes (of each prompt's state
     after its first and before its last step, and how many tokens lie between).
All prompts are decoded together, each as a sequence of its own. The .npz file has every position's logits, by prompt.
"""

import ctypes
import json
import sys

import llama_cpp
import numpy as np

TYPES = {"f32": llama_cpp.GGML_TYPE_F32, "f16": llama_cpp.GGML_TYPE_F16}


@llama_cpp.llama_log_callback
def quiet(level, text, data):
    if level == 4:  # errors
        sys.stderr.write(text.decode())


class Engine:
    def __init__(self, path, cache, n_batch, sequences):
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        options = llama_cpp.llama_model_default_params()
        # On CPUs with AMX the llama.cpp of 0.3.36 puts attn_k_b where its own products cannot read it (GGML_ASSERT in
        # ggml-backend.cpp): the products of deepseek2 are with permuted queries. llama-server has --no-repack for this.
        options.use_extra_bufts = False
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), options)
        if not self.model:
            raise SystemExit(f"llama.cpp did not load {path}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = 2048, n_batch, n_batch
        settings.n_seq_max, settings.kv_unified = sequences, True
        settings.n_threads = settings.n_threads_batch = 1
        settings.type_k = settings.type_v = TYPES[cache]
        settings.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )  # its CPU kernel has a float16 mask and sums
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.n_batch, self.size = n_batch, llama_cpp.llama_vocab_n_tokens(self.vocab)

    def step(self, tokens):
        """Logits after each (token, position, sequence), in steps of at most n_batch of them, sequences mixed."""
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

    def ids(self, text):
        raw, room = text.encode(), len(text.encode()) + 8
        found = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self.vocab, raw, len(raw), found, room, True, True)
        return list(found[:count])

    def text(self, ids):
        given, room = (llama_cpp.llama_token * len(ids))(*ids), 64 * len(ids)
        buffer = ctypes.create_string_buffer(room)
        count = llama_cpp.llama_detokenize(self.vocab, given, len(ids), buffer, room, False, False)
        return buffer.raw[:count].decode(errors="replace")

    def bytes(self, sequence):
        return llama_cpp.llama_state_seq_get_size(self.context, sequence)


def run(request):
    prompts, new = request.get("prompts", []), request.get("new", 0)
    engine = Engine(request["model"], request.get("cache", "f32"), request.get("n_batch", 512), max(1, len(prompts)))
    out = {"ids": [engine.ids(text) for text in request.get("texts", [])]}
    if not prompts:
        return out
    longest = max(map(len, prompts))
    mixed = [(prompt[at], at, i) for at in range(longest) for i, prompt in enumerate(prompts) if at < len(prompt)]
    rows = engine.step(mixed)
    logits = [[row for row, (_, _, i) in zip(rows, mixed) if i == each] for each in range(len(prompts))]
    first = [engine.bytes(i) for i in range(len(prompts))]
    for _ in range(new - 1):
        tokens = [(int(own[-1].argmax()), len(own), i) for i, own in enumerate(logits)]
        for own, row in zip(logits, engine.step(tokens)):
            own.append(row)
    last = [engine.bytes(i) for i in range(len(prompts))]
    out["tokens"] = [[int(row.argmax()) for row in own[len(prompt) - 1 :]] for own, prompt in zip(logits, prompts)]
    out["text"] = [engine.text(prompt + tokens) for prompt, tokens in zip(prompts, out["tokens"])]
    out["bytes"] = [[a, b, new - 1] for a, b in zip(first, last)]
    np.savez(request["logits"], *[np.stack(own) for own in logits])
    return out


json.dump(run(json.load(sys.stdin)), sys.stdout)
