"""The original of a benchmark, text to calibrate on and to score on, and what the original says of the latter."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from testbed.corpus import documents, sample
from torch import Tensor

from anymla.data.text import calibration_windows, text_windows
from anymla.evaluation.logits import Logits, logits_of_pass
from anymla.evaluation.scores import ScoreSums
from anymla.io.checkpoint import load_model, load_tokenizer

Forward = Callable[[Tensor], Logits]  # token ids [1,T]


@dataclass(frozen=True)
class Protocol:
    """Text and sizes of all rows of a model; a row is measured again where any of them differs."""

    text: tuple[str, ...]
    held_out: tuple[str, ...]
    calibration_tokens: int
    windows: int  # of each held-out text
    length: int

    def names(self) -> dict[str, Any]:
        """The protocol as rows tell it: files by their names."""
        files = {side: [Path(path).name for path in getattr(self, side)] for side in ("text", "held_out")}
        return files | {name: getattr(self, name) for name in ("calibration_tokens", "windows", "length")}


@dataclass
class Bench:
    """One model's benchmark. ``scratch``: a folder for checkpoints, and for the calibration text as one file."""

    folder: Path
    protocol: Protocol
    scratch: Path
    notes: dict[Any, Any] = field(default_factory=dict)  # what several rows need, made once

    def __post_init__(self) -> None:
        self.original, tokenizer = load_model(self.folder, dtype="float32"), load_tokenizer(self.folder)
        self.calibration_file = sample(map(Path, self.protocol.text), self.scratch / "calibration.jsonl", piece=8192)
        self.calibration = calibration_windows(self.calibration_file, tokenizer, seed=0, **self.calibration_size())
        self.windows = {
            Path(path).name: held_out(Path(path), tokenizer, self.protocol.windows, self.protocol.length)
            for path in self.protocol.held_out
        }
        self._said: dict[str, list[Tensor]] = {}

    def calibration_size(self) -> dict[str, int]:
        """Tokens and length of the calibration windows."""
        return {"tokens": self.protocol.calibration_tokens, "length": self.protocol.length}

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in the original's cache of 16-bit numbers."""
        return 2 * self.numbers

    @property
    def numbers(self) -> int:
        """Numbers of a token in the original's cache."""
        config = self.original.config
        heads, head_dim = config.num_key_value_heads, self.head_dim
        return int(2 * heads * head_dim * config.num_hidden_layers)

    @property
    def head_dim(self) -> int:
        """Dims of a head."""
        config = self.original.config
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    @torch.no_grad()
    def scores(self, forward: Forward) -> dict[str, Any]:
        """KL, perplexity and same top token of ``forward`` to the original: of all text, and of each."""
        total, each = ScoreSums(), {}
        for name, windows in self.windows.items():
            sums = ScoreSums()
            for ids, said in zip(windows.split(1), self.said(name), strict=True):
                logits = forward(ids)
                for added in (total, sums) if len(self.windows) > 1 else (total,):
                    added.add(logits, ids, Logits.of(said))
            each[name] = _qualities(sums) if len(self.windows) > 1 else _qualities(total)
        return _qualities(total) | {"texts": each}

    @torch.no_grad()
    def said(self, name: str) -> list[Tensor]:
        """The original's log-probabilities on a text's windows, [1,T,V] in float16 each; made once."""
        if name not in self._said:
            kept = []
            for ids in self.windows[name].split(1):
                logits = logits_of_pass(self.original, {"input_ids": ids})
                parts = [logits.at(part).float().log_softmax(-1).half() for part in logits.parts()]
                kept.append(torch.cat(parts, dim=1))
            self._said[name] = kept
        return self._said[name]

    def plain(self, ids: Tensor) -> Logits:
        """The original's own logits."""
        return logits_of_pass(self.original, {"input_ids": ids})


def _qualities(sums: ScoreSums) -> dict[str, float | None]:
    perplexity, kl = sums.quality()
    return {"kl": kl, "perplexity": perplexity, "top1_agreement": float(sums.agreed) / sums.scored}


def held_out(path: Path, tokenizer: Any, count: int, length: int) -> Tensor:
    """Windows [N,T] from all over a text."""
    texts = documents([path])
    random.Random(0).shuffle(texts)
    windows = text_windows(texts, tokenizer, path, length=length, tokens=64 * count * length)
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:count]]
