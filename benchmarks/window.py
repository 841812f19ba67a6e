"""What a window of exact keys and values beside the latent would bring: an idea that anymla does not use.

    python benchmarks/window.py MODEL --text train.jsonl.xz --held-out valid.jsonl.xz

Each query sees the last w tokens as the original does and all older ones through the latent, in one softmax. Bytes are
those of the latents and of w tokens of the original's cache, at contexts of --length and of 4096 tokens. The window is
there already when each layer takes its gradient steps. For Llamas whose heads
are together as wide as the hidden state.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from fidelity import Protocol, held_out_windows, sample
from rich.console import Console
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import anymla
from anymla.evaluation.scores import score_model
from anymla.io.checkpoint import load_model
from anymla.modeling.heads import rope_tables
from anymla.modeling.latent_attention import LatentAttention
from anymla.report.tables import table

LONG = 4096
CASES = ((0.25, 0), (0.1875, 0), (0.125, 0), (0.125, 16), (0.125, 32), (0.125, 64))  # share of the latent, window


def windowed_forward(originals: dict[int, Any], window: int) -> Any:
    """LatentAttention.forward for whole texts, with ``originals`` for the last ``window`` tokens."""
    means: dict[int, Tensor] = {}

    def forward(
        self: LatentAttention,
        hidden_states: Tensor,
        residual: Any = None,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        position_ids: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        def heads(projection: Any) -> Tensor:
            made: Tensor = projection(hidden_states.float()).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            return made

        def per_query_head(states: Tensor) -> Tensor:
            return states.repeat_interleave(self.num_key_value_groups, dim=1)

        tables = rope_tables(
            self.rope_table, self.rope_pairs, position_embeddings, position_ids, hidden_states, self.config
        )
        latent, rope_key = self.compress(hidden_states, *tables)
        if past_key_values is not None:
            past_key_values.update(latent, rope_key, self.layer_idx)
        key, value = map(per_query_head, self.expand_kv(latent, rope_key))
        query = torch.cat(self.queries(hidden_states, *tables, position_ids), dim=-1)
        exact = originals[self.layer_idx]
        turned = apply_rotary_pos_emb(heads(exact.q_proj), heads(exact.k_proj), *position_embeddings)
        exact_query, exact_key, exact_value = (
            states.to(value.dtype) for states in (turned[0], *map(per_query_head, (turned[1], heads(exact.v_proj))))
        )
        if self.layer_idx not in means and self.kv_lora_rank < 2 * self.num_kv_heads * self.head_dim:
            mean = torch.linalg.solve(self.o_proj.weight.detach().double(), self.o_proj.bias.detach().double())
            means[self.layer_idx] = mean.view(-1, 1, self.head_dim)  # of the values: the bias holds it at first
        exact_value = exact_value - means.get(self.layer_idx, torch.zeros(())).to(value.dtype)
        place = torch.arange(hidden_states.shape[1])
        distance = place[:, None] - place
        near = distance < window
        scores = torch.where(near, exact_query @ exact_key.mT, query @ key.mT) * self.scaling
        share = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
        output = (share * near) @ exact_value + (share * ~near) @ value
        return self._project(output.transpose(1, 2), hidden_states, residual), None

    return forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--reconstruction-steps", type=int)
    options = parser.parse_args()
    original, rows = load_model(options.model), []
    finer = load_model(options.model, dtype="float32")  # as the gradient steps are
    originals = {layer.self_attn.layer_idx: layer.self_attn for layer in finer.model.layers}
    sizes = (32768, options.length, options.tokens, options.length)
    protocol = Protocol(tuple(options.text), tuple(options.held_out), *sizes)
    windows, plain = held_out_windows(options.model, protocol), LatentAttention.forward
    with tempfile.TemporaryDirectory() as scratch:
        common: dict[str, Any] = {"calibration": sample(protocol.text, "", Path(scratch)), "overwrite": True}
        common |= {"calibration_length": options.length, "reconstruction_steps": options.reconstruction_steps}
        for share, window in CASES:
            LatentAttention.forward = windowed_forward(originals, window) if window else plain  # type: ignore[method-assign]
            out = Path(scratch) / "out"
            anymla.convert(options.model, out, kv_cache=share, **common)
            scores = score_model(load_model(out), windows, original)
            kept = [f"{share + window / context:.1%}" for context in (options.length, LONG)]
            rows.append((f"{share:.4g}", str(window), *kept, f"{scores.perplexity:.2f}", f"{scores.kl:.3f}"))
    LatentAttention.forward = plain  # type: ignore[method-assign]
    columns = ("latent", "window", f"bytes at {options.length}", f"at {LONG}", "perplexity", "KL")
    title = f"{options.model.name} in contexts of {options.length} tokens"
    Console(width=100, highlight=False).print(table(title, columns, rows))


if __name__ == "__main__":
    main()
