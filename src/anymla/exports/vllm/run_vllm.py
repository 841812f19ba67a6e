"""vLLM on one model folder, by any Python that has it: a JSON object on stdin, one on stdout after a marker.

In:  model (a folder), dtype, trust (whether its code may run), length (most tokens of a sequence), prompts (lists of
     ids), new (how many tokens to add to each, greedily), backend (vLLM's name of an attention).
Out: tokens (the new ids of each prompt), logprobs (of these), prompt_logprobs (of each prompt's tokens from its second
     on), attention and backend (names), cache_bytes_per_token (in all layers together, measured), layers, version
     (vLLM's), anymla (whether it could be imported). Or unsuited alone: why this vLLM is not asked.
Nothing of anymla is imported: a crash of vLLM stays in this process.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from typing import Any

MARKER = "anymla-result:"
# vLLM 0.32 hangs on few cores when it starts its engine in a process of its own, as it does by default.
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
}


def load(job: dict[str, Any]) -> Any:
    """The model, on a CPU."""
    import vllm

    # vLLM 0.32 on a CPU turns query and key of three dimensions wrongly in its C++ rope; torch's own way is right.
    rope = {"custom_ops": ["-rotary_embedding"]} if vllm.__version__.startswith("0.32.") else {}
    return vllm.LLM(
        model=job["model"],
        trust_remote_code=job["trust"],
        dtype=job["dtype"],
        max_model_len=job["length"],
        enforce_eager=True,
        max_num_seqs=len(job["prompts"]),
        max_num_batched_tokens=max(512, job["length"]),
        kv_cache_memory_bytes=64 << 20,
        distributed_executor_backend="uni",
        attention_config={"backend": job["backend"]},  # where a CPU has AMX, vLLM prefers a backend for bfloat16 alone
        compilation_config=rope,
    )


def cache_bytes(runner: Any) -> float:
    """Bytes that one token takes, in all layers together: those of a block of each cache tensor, by its tokens."""
    return float(sum(cache[0].nbytes for cache in runner.kv_caches) / runner.cache_config.block_size)


def chosen(tokens: Any, steps: Any) -> list[float]:
    """The log probability of each token."""
    return [step[token].logprob for token, step in zip(tokens, steps, strict=True)]


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Answers one request."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():  # before vLLM starts
        return {"unsuited": "the check is for vLLM on CPUs, and the one installed is for another platform"}
    from vllm import SamplingParams, __version__

    llm = load(job)
    settings = [
        SamplingParams(temperature=0, max_tokens=new, logprobs=1, prompt_logprobs=1, ignore_eos=True)
        for new in job["new"]
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], settings, use_tqdm=False)
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    layers = runner.compilation_config.static_forward_context
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [chosen(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs],
        "prompt_logprobs": [chosen(output.prompt_token_ids[1:], output.prompt_logprobs[1:]) for output in outputs],
        "attention": sorted({type(layer).__name__ for layer in layers.values()}),
        "backend": sorted({layer.attn_backend.get_name() for layer in layers.values()}),
        "cache_bytes_per_token": cache_bytes(runner),
        "layers": len(runner.kv_caches),
        "version": __version__,
        "anymla": find_spec("anymla") is not None,
    }


if __name__ == "__main__":
    os.environ |= SETTINGS
    sys.stdout.write(f"{MARKER}{json.dumps(run(json.load(sys.stdin)))}\n")
