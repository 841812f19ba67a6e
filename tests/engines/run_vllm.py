"""Runs vLLM on a model folder, as its environment's python: JSON on stdin, JSON after a marker on stdout.

In: {"model", "dtype", "prompts": token ids of each, "tokens": how many to generate, "trust": bool, "length"}.
Out: {"tokens", "logprobs" of these, "prompt_logprobs" of each prompt's tokens from its second on, "attention" and
"backend": names, "cache_bytes_per_token" in all "layers", measured, "anymla": whether it could be imported}.
"""

import json
import os
import sys
from importlib.util import find_spec

# vLLM 0.32 hangs on few cores when it starts its engine in a process of its own, as it does by default.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
}
MARKER = "anymla-result:"


def cache_bytes(runner):
    """Bytes that one token takes, in all layers together: those of a block of each cache tensor, by its tokens."""
    return sum(cache[0].nbytes for cache in runner.kv_caches) / runner.cache_config.block_size


def chosen(tokens, steps):
    """The log probability of each token."""
    return [step[token].logprob for token, step in zip(tokens, steps)]


def main():
    job = json.load(sys.stdin)
    import vllm
    from vllm import LLM, SamplingParams

    # vLLM 0.32 on a CPU turns query and key of three dimensions wrongly in its C++ rope; torch's own way is right.
    rope = {"custom_ops": ["-rotary_embedding"]} if vllm.__version__.startswith("0.32.") else {}
    llm = LLM(
        model=job["model"],
        trust_remote_code=job["trust"],
        dtype=job["dtype"],
        max_model_len=job["length"],
        enforce_eager=True,
        max_num_seqs=4,
        max_num_batched_tokens=max(512, job["length"]),
        kv_cache_memory_bytes=64 << 20,
        distributed_executor_backend="uni",
        attention_config={"backend": "CPU_MLA"},  # where a CPU has AMX, vLLM prefers a backend for bfloat16 alone
        compilation_config=rope,
    )
    settings = SamplingParams(temperature=0, max_tokens=job["tokens"], logprobs=1, prompt_logprobs=1, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], settings, use_tqdm=False)
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    layers = runner.compilation_config.static_forward_context
    result = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [chosen(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs],
        "prompt_logprobs": [chosen(output.prompt_token_ids[1:], output.prompt_logprobs[1:]) for output in outputs],
        "attention": sorted({type(layer).__name__ for layer in layers.values()}),
        "backend": sorted({layer.attn_backend.get_name() for layer in layers.values()}),
        "cache_bytes_per_token": cache_bytes(runner),
        "layers": len(runner.kv_caches),
        "anymla": find_spec("anymla") is not None,
    }
    sys.stdout.write(f"{MARKER}{json.dumps(result)}\n")


if __name__ == "__main__":
    main()
