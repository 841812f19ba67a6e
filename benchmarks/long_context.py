"""Quality by position in a long context, for conversions that were calibrated on shorter windows.

    python benchmarks/long_context.py SmolLM2-135M-Instruct --text train.jsonl.xz --held-out wikitext.txt
    python benchmarks/long_context.py gemma-3-270m ... --length 4096 --layers all sliding full
    python benchmarks/long_context.py MODEL ... --only "12.5 %" --calibration-lengths 512
    python benchmarks/long_context.py MODEL ... --only nothing --converted NAME=OUT      a conversion that is there

A held-out text of ``--length`` tokens runs as one context, and once more cut into windows of 512. So each token is
scored with a long and with a short context. ``--probe N`` plants rows of tokens, or a word, in N tokens of it and
asks for them at its end; 0 leaves this out. ``--layers sliding``: the others keep their own attention. A row is
measured once and kept in OUT/long-context.json. OUT/long-context.md is written after each one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
import yaml
from cache_bench import held_out
from fidelity import Rows, text_of
from long_context_page import write_page
from testbed.corpus import sample
from torch import Tensor

import anymla
from anymla.account import measure
from anymla.data.text import bundled_text
from anymla.demo import bundled_model
from anymla.errors import AnymlaError
from anymla.evaluation.likelihood import Query, answers, untracked
from anymla.evaluation.logits import Logits, logits_of_pass
from anymla.evaluation.probe import DEPTHS, GIVEN, PLANTED, TRIALS, probe_questions
from anymla.io.checkpoint import load_tokenizer
from anymla.io.computing import load_to_compute
from anymla.io.real_models import PACKAGES, real_model
from anymla.model_run.stream import decoder_layers

CASES: dict[str, dict[str, Any]] = {
    "anymla 12.5 %, decode cost 2": {"transform_coding": {"kv_cache": 0.125}},
    "anymla 12.5 %, decode cost any": {"transform_coding": {"kv_cache": 0.125, "decode_cost": "any"}},
    "anymla 12.5 %, no exact tokens": {"transform_coding": {"kv_cache": 0.125, "first_tokens": 0, "exact_window": 0}},
    "anymla 12.5 %, no exact window": {"transform_coding": {"kv_cache": 0.125, "exact_window": 0}},
    "mla 25 %, 16 bits": {"mla": {"kv_cache": 0.25, "reconstruction_steps": 0}},  # nothing here is trained
    "KVQuant, 4 bits": {"kvquant": {"bits": 4}},
    "anymla 25 %, decode cost 2": {"transform_coding": {"kv_cache": 0.25}},
    "anymla 25 %, decode cost any": {"transform_coding": {"kv_cache": 0.25, "decode_cost": "any"}},
}
EDGES = (0, 512, 1024, 2048, 4096, 8192, 16384, 32768)
SHORT = 512  # tokens of a window of the same text
MIDDLE, NEEDLES = 0.5, 2


@dataclass(frozen=True)
class Calibration:
    """Text and sizes that a model was calibrated on."""

    text: str
    tokens: int
    length: int

    @classmethod
    def of(cls, converted: Path) -> Calibration:
        """That of a conversion of one step."""
        (settings,) = yaml.safe_load((converted / "recipe.yaml").read_text())["steps"][0].values()
        text = settings["calibration"] or bundled_text("train")
        return cls(Path(text).name, settings["calibration_tokens"], settings["calibration_length"])


@dataclass(frozen=True)
class Protocol:
    """Text and sizes that all rows of a model are scored on."""

    held_out: str
    length: int
    probe: int


class LongBench:
    """A model, the text that is scored, and what the original says of it."""

    def __init__(self, folder: Path, text: Path, held: Path, protocol: Protocol, scratch: Path) -> None:
        self.original, tokenizer = load_to_compute(folder), load_tokenizer(folder)
        self.folder, self.out = folder, scratch / "out"
        self.text = sample([text], scratch / "calibration.jsonl", piece=16384)
        window = held_out(held, tokenizer, 1, protocol.length)
        begun = int(tokenizer.bos_token_id == int(window[0, 0]))
        first, rest = window[:, :begun], window[:, begun:]
        self.begun, self.made = begun, None
        self.windows = [window, *(torch.cat([first, part], dim=1) for part in rest.split(SHORT, dim=1))]
        self.said = [logits_of_pass(self.original, {"input_ids": ids}) for ids in self.windows]
        self.probed = probe_queries(tokenizer, window[0].tolist(), protocol.probe) if protocol.probe else []

    def convert(self, steps: dict[str, Any], calibration: Calibration) -> Path:
        """The folder of the model after one step."""
        ((name, settings),) = steps.items()
        text = {"calibration": self.text, "calibration_tokens": calibration.tokens}
        text["calibration_length"] = calibration.length
        if self.made != (steps, calibration):
            anymla.run(self.folder, self.out, [{name: text | settings}], overwrite=True, restart=True)
            self.made = (steps, calibration)
        return self.out

    def load(self, converted: Path, layers: str) -> Any:
        """A converted model; ``layers``: those that keep what they became, the others are the original's again."""
        model = load_to_compute(converted)
        kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
        for kind, layer, own in zip(kinds, decoder_layers(model), decoder_layers(self.original), strict=True):
            if layers not in ("all", kind.removesuffix("_attention")):
                layer.self_attn = own.self_attn
        return model

    def row(self, case: str, calibration: Calibration | None, layers: str, ready: Path | None) -> dict[str, Any]:
        """What is measured of a case, or why it is not; ``ready``: a conversion that is there."""
        started = time.monotonic()
        try:
            made = ready or (self.convert(CASES[case], calibration) if calibration else None)
        except AnymlaError as error:
            return {"refused": str(error)}
        model = self.original if made is None else self.load(made, layers)
        found = {"buckets": self.buckets(model), **self.probe(model)}
        length = self.windows[0].shape[1]
        ours, whole = (measure(each, (length,)).cache_bytes_at[str(length)] for each in (model, self.original))
        return found | {"share": ours / whole, "seconds": time.monotonic() - started}

    def buckets(self, model: Any) -> list[dict[str, float]]:
        """Means between EDGES: KL and losses in the long context, and KL of the same tokens in short ones."""
        own = model is self.original
        logits = self.said if own else [logits_of_pass(model, {"input_ids": ids}) for ids in self.windows]
        windows = zip(self.windows, logits, self.said, strict=True)
        scored = [by_token(*window)[:, self.begun :] for window in windows]
        cut = torch.cat(scored[1:], dim=1)
        whole = scored[0].where(cut.isfinite(), torch.nan)  # the same tokens
        found = []
        for start, stop in pairwise(EDGES):
            if start < whole.shape[1]:
                kl, loss = whole[:, start:stop].nanmean(1).tolist()
                short = cut[0, start:stop].nanmean().item()
                found.append({"start": start, "kl": kl, "loss": loss, "short_kl": short})
        return found

    def probe(self, model: Any) -> dict[str, float]:
        """Share of the planted rows' tokens that are found likeliest, and the mean probability of the planted words."""
        if not self.probed:
            return {}
        copy, *needles = answers(model, self.probed, context=None, batch_size=1, track=untracked, label="probe")
        asked = copy.likeliest.view(-1, PLANTED)[:, GIVEN:].float()
        words = torch.cat([needle.log_probs.exp() for needle in needles])
        return {"copy": asked.mean().item(), "needle": words.mean().item()}


@torch.no_grad()
def by_token(ids: Tensor, logits: Logits, said: Logits) -> Tensor:
    """KL to the original in nats and loss: [2,T] of tokens ``ids`` [1,T]; NaN for the first."""
    found = torch.full((2, ids.shape[1]), torch.nan)
    for part in logits.parts(last=ids.shape[1] - 1):
        log_p, log_q = (each.at(part)[0].float().log_softmax(-1) for each in (logits, said))
        places = slice(part.start + 1, part.stop + 1)
        found[0, places] = (log_q.exp() * (log_q - log_p)).sum(-1)
        found[1, places] = -log_p.gather(-1, ids[0, places, None])[:, 0]
    return found


def probe_queries(tokenizer: Any, filler: list[int], length: int) -> list[Query]:
    """All rows of ``anymla eval --probe`` at as many depths of one context, and two of its needles, half-way in it."""
    made = probe_questions(tokenizer, length).queries  # copies first and needles last, each by length, depth, trial
    rows = [list(query.ids[-PLANTED:]) for query in made[:TRIALS]]
    step = (length - 2 * TRIALS * PLANTED) // TRIALS
    starts = [1 + trial * step for trial in range(TRIALS)]
    context = [token for row, at in zip(rows, starts, strict=True) for token in (*row, *filler[at : at + step])]
    copy = Query([filler[0], *context, *(token for row in rows for token in row)], 1 + len(context))
    half = TRIALS * (DEPTHS.index(MIDDLE) - len(DEPTHS))
    return [copy, *made[half : half + NEEDLES]]


def model_folder(name: Path) -> Path:
    """A checkpoint, or a real model that comes as a Python package."""
    return real_model(str(name), print) if str(name) in PACKAGES else name


def jobs(text: Path, given: argparse.Namespace) -> Iterator[tuple[str, Calibration | None, Path | None]]:
    """Names of rows, what their models are calibrated on, and where these are if somebody made them."""
    yield "original", None, None
    for name, _, folder in (each.partition("=") for each in given.converted):
        yield name, Calibration.of(Path(folder)), Path(folder)
    named = [name for name in CASES if not given.only or any(part in name for part in given.only)]
    for length, name in product(given.calibration_lengths, named):
        yield name, Calibration(text.name, given.calibration_tokens, length), None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=bundled_model())
    parser.add_argument("-o", "--out", type=Path, default=Path("docs"))
    parser.add_argument("--text", type=Path)
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--only", nargs="+", default=[], metavar="PART")
    parser.add_argument("--calibration-lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=8192, help="tokens of the scored context")
    parser.add_argument("--probe", type=int, default=2048, help="tokens of the probe's context")
    parser.add_argument("--layers", nargs="+", default=["all"], choices=("all", "sliding", "full"))
    parser.add_argument("--converted", nargs="+", default=[], metavar="NAME=FOLDER")
    given = parser.parse_args()
    folder = model_folder(given.model)
    text, held = (
        Path(text_of(folder, path and [path], name)[0])
        for path, name in ((given.text, "train"), (given.held_out, "valid"))
    )
    protocol = Protocol(held.name, given.length, given.probe)
    given.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(given.out / "long-context.json", again=False)
    with tempfile.TemporaryDirectory() as scratch:
        bench = LongBench(folder, text, held, protocol, Path(scratch))
        for name, calibration, ready in jobs(text, given):
            for layers in given.layers if calibration else ["all"]:
                calibrated = None if calibration is None else asdict(calibration)
                key = {"model": folder.name, "case": name, "calibration": calibrated, "layers": layers}
                key |= {"protocol": asdict(protocol)}
                if not rows.has(key):
                    rows.keep(key, bench.row(name, calibration, layers, ready))
                    write_page(given.out / "long-context.md", rows.rows)
                    print(rows.rows[-1], flush=True)


if __name__ == "__main__":
    main()
