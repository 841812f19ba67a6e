"""`anymla demo`: a model at an eighth of its KV cache's bytes, beside other ways to have as small a cache."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from anymla.account import measure
from anymla.data.text import bundled_text, read_documents, text_windows
from anymla.errors import AnymlaError, InfeasibleError, OutputError
from anymla.evaluation.generation import Talk, continuation
from anymla.evaluation.reference import Reference
from anymla.evaluation.scores import Scores
from anymla.io.checkpoint import copy_companions, load_model, load_tokenizer, new_folder
from anymla.io.computing import load_to_compute
from anymla.io.real_models import real_model
from anymla.report.demo import demo_page
from anymla.report.results import RESULTS
from anymla.runner import run

Report = Callable[[int, int | None, str], None]  # (done, of how many, what)
Note = Callable[[str], None]

REAL, BUNDLED = "SmolLM2-135M-Instruct", "stories260K"
# The original is sure how to begin its answers.
QUESTIONS = ("Why is the sky blue?", "Write a short story about a cat and a mouse.")
STORIES = ("Once upon a time, there was a little girl named Lily. She", "One day, Tom found a big red ball")
OURS, TABLES, PAPER = "anymla", "KVQuant", "MHA2MLA"
KEPT = 0.125  # of the bytes; this conversion is kept, and answers
BUDGETS = (0.5, 0.25, KEPT)  # of the bundled model
TOKENS = {"calibration_tokens": 4096, "calibration_length": 512}  # fewer than by default: minutes
FEW_TOKENS = {"calibration_tokens": 512, "calibration_length": 64}  # for the paper's mean norms of keys and queries
WINDOW, BATCH = 256, 4  # tokens of a window, windows at once
REAL_WINDOWS, BUNDLED_WINDOWS = 8, 64
ANSWER_TOKENS = 96


@dataclass(frozen=True)
class Contender:
    """A way to a smaller cache, and how good it is.

    ``budget``: the share of the bytes to keep; ``step``: of a recipe, which does it; ``scores``: None until they are
    known, and where the bytes are too few, which ``infeasible`` says.
    """

    method: str
    budget: float
    step: dict[str, dict[str, Any]]
    scores: Scores | None = None
    infeasible: str | None = None


@dataclass(frozen=True)
class Subject:
    """The model that is converted: name, folder, windows of text to score on, and the ways to convert it."""

    name: str
    folder: Path
    windows: int
    contenders: tuple[Contender, ...]


@dataclass(frozen=True)
class Answer:
    """Replies of the original and of the conversion to the same prompt."""

    prompt: str
    original: str
    converted: str


@dataclass(frozen=True, kw_only=True)
class DemoOutcome:
    """The results of the demo; ``output`` holds the conversion, the page and these results."""

    model: str
    output: Path
    original: Scores
    contenders: tuple[Contender, ...]
    answers: tuple[Answer, ...]
    seconds: float

    own: ClassVar[str] = OURS
    converted: ClassVar[str] = f"converted, {KEPT:.1%} of the bytes"

    def to_dict(self) -> dict[str, Any]:
        """The outcome under its stable JSON names."""
        return asdict(self) | {"output": str(self.output)}


def bundled_model() -> Path:
    """The small trained model in the package: stories260K, a Llama with GQA (MIT)."""
    return bundled_text("train").parent / BUNDLED


def run_demo(output: Path, *, bundled: bool = False, report: Report, note: Note) -> DemoOutcome:
    """Converts, scores, asks, and writes ``output``: model/, report.html and results.json.

    Args:
        output: the folder; an earlier demo's is replaced.
        bundled: take the bundled model, and not the real one, which is fetched as a package.
        report: called with how far each part is.
        note: called with what the user should know, in words.

    Raises:
        OutputError: ``output`` exists and is not an earlier demo's.
    """
    if output.exists() and not (output / RESULTS).is_file():
        raise OutputError(f"{output} exists and is not an earlier demo's folder: choose another -o")
    started = time.monotonic()
    with new_folder(output) as folder, tempfile.TemporaryDirectory() as made:
        scratch = Path(made)
        subject = (None if bundled else _real(report, note)) or _bundled(scratch)
        report(0, None, "running the original")
        original, tokenizer = load_to_compute(subject.folder), load_tokenizer(subject.folder)
        documents, tokens = read_documents(bundled_text("valid")), subject.windows * WINDOW
        windows = text_windows(documents, tokenizer, "bundled text", length=WINDOW, tokens=tokens)
        text = Reference.of(original, windows, batch=BATCH)
        scored = []
        for number, contender in enumerate(subject.contenders, 1):
            kept = (contender.method, contender.budget) == (OURS, KEPT)
            target = folder / "model" if kept else scratch / str(number)
            scored.append(_scored(contender, subject.folder, target, text, _numbered(report, number, subject)))
        report(0, None, "asking both")
        converted = load_to_compute(folder / "model")
        outcome = DemoOutcome(
            model=subject.name,
            output=output,
            original=text.scores(original, measure(original)),
            contenders=tuple(scored),
            answers=_answers(original, converted, tokenizer),
            seconds=time.monotonic() - started,
        )
        _write(outcome, folder)
    return outcome


def _real(report: Report, note: Note) -> Subject | None:
    """The real model; None where it cannot be had."""
    report(0, None, f"fetching {REAL}")
    contenders = (_ours(KEPT), _tables(2 * KEPT), _tables(KEPT), _paper(KEPT, 8))
    try:
        return Subject(REAL, real_model(REAL, note), REAL_WINDOWS, contenders)
    except AnymlaError as error:
        note(f"{error}; the bundled model is converted instead")
        return None


def _bundled(scratch: Path) -> Subject:
    """The bundled model in 16 bits, as others are, so that shares of bytes mean the same."""
    source, folder = bundled_model(), scratch / BUNDLED
    load_model(source, dtype="bfloat16").save_pretrained(folder)
    copy_companions(source, folder)
    contenders = (make for budget in BUDGETS for make in (_ours(budget), _tables(budget), _paper(budget, 2)))
    return Subject(BUNDLED, folder, BUNDLED_WINDOWS, tuple(contenders))


def _ours(budget: float) -> Contender:
    return Contender(OURS, budget, {"transform_coding": {"kv_cache": budget, "decode_cost": "any"} | TOKENS})


def _tables(budget: float) -> Contender:
    return Contender(TABLES, budget, {"kvquant": {"bits": round(16 * budget), "sparse": 0.0} | TOKENS})


def _paper(budget: float, rope_dims: int) -> Contender:
    """``rope_dims``: of each KV head."""
    paper = {"rope": "two-norm", "rope_dims": rope_dims, "factorization": "joint-svd", "expected_rotation": False}
    return Contender(PAPER, budget, {"mla": {"kv_cache": budget} | paper | FEW_TOKENS})


def _numbered(report: Report, number: int, subject: Subject) -> Report:
    """Reports under the name of a contender."""
    contender = subject.contenders[number - 1]
    name = f"{number} of {len(subject.contenders)}, {contender.method} at {contender.budget:.1%} of the bytes"
    return lambda done, total, what: report(done, total, f"{name}: {what}")


def _scored(contender: Contender, source: Path, target: Path, text: Reference, report: Report) -> Contender:
    """The contender with its scores; what it makes of ``source`` goes to ``target``."""
    report(0, None, "reading")

    def progress(number: int, step: Any, done: int = 0, total: int | None = None, result: Any = None) -> None:
        if total is not None:
            report(done, total, result if isinstance(result, str) else "layer")

    try:
        run(source, target, [contender.step], progress=progress)
    except InfeasibleError as error:
        return replace(contender, infeasible=str(error))
    report(0, None, "scoring")
    model = load_to_compute(target)
    return replace(contender, scores=text.scores(model, measure(model)))


def _answers(original: Any, converted: Any, tokenizer: Any) -> tuple[Answer, ...]:
    """Greedy replies by the chat template; the continuations of two beginnings where there is none."""
    chats = tokenizer.chat_template is not None

    def ask(model: Any, prompt: str) -> str:
        if chats:
            return Talk(model, tokenizer, options={"do_sample": False}).answer(prompt, max_new_tokens=ANSWER_TOKENS)
        return continuation(model, tokenizer, prompt, max_new_tokens=ANSWER_TOKENS, do_sample=False)

    prompts = QUESTIONS if chats else STORIES
    return tuple(Answer(prompt, ask(original, prompt), ask(converted, prompt)) for prompt in prompts)


def _write(outcome: DemoOutcome, folder: Path) -> None:
    """Writes the results and the page."""
    (folder / RESULTS).write_text(json.dumps(outcome.to_dict(), indent=2) + "\n", encoding="utf-8")
    demo_page(outcome).write(folder)
