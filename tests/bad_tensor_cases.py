"""Bad tensors in whole files, of Llama and of other families."""

from collections.abc import Callable

import torch

from tests.damage import (
    CONVERT,
    EVAL,
    GENERATE,
    MODEL_FILE,
    NORM,
    UP_PROJ,
    V_PROJ,
    Case,
    Damage,
    all_of,
    below,
    config,
    larger_vocabulary,
    number,
    tensors,
    tiny,
)


def renamed(old: str, new: str) -> Damage:
    return tensors(lambda state: state.update({new: state.pop(old)}))


def cast(name: str, dtype: torch.dtype) -> Damage:
    return tensors(lambda state: state.update({name: state[name].to(dtype)}))


ABSENT, EXTRA = "lacks the tensor", "config has no place for"
TENSORS = [
    Case("tensor-int8", CONVERT, (MODEL_FILE, V_PROJ, "I8"), cast(V_PROJ, torch.int8)),
    Case("tensor-uint8", CONVERT, (MODEL_FILE, UP_PROJ, "U8"), cast(UP_PROJ, torch.uint8)),
    Case("tensor-bool", f"{GENERATE} Once", (MODEL_FILE, V_PROJ, "BOOL"), cast(V_PROJ, torch.bool)),
    Case("tensor-int64", f"{EVAL} {{valid}}", (MODEL_FILE, V_PROJ, "I64"), cast(V_PROJ, torch.int64)),
    Case("tensor-float8", CONVERT, (MODEL_FILE, V_PROJ, "F8"), cast(V_PROJ, torch.float8_e4m3fn)),
    Case("tensor-complex", CONVERT, (MODEL_FILE, V_PROJ), cast(V_PROJ, torch.complex64)),
    Case("tensor-minus-inf", f"{GENERATE} Once", (V_PROJ, "infinity"), number(V_PROJ, float("-inf"))),
    Case(
        "tensor-exponent-bits",
        CONVERT,
        (NORM, "NaN or infinity"),
        tensors(lambda state: state[NORM].view(torch.int32)[0].fill_(0x7F80_0001)),
    ),
    Case("tensor-1e38", CONVERT, (), number(UP_PROJ, 3e38)),
    Case(
        "tensor-more-dims",
        CONVERT,
        (V_PROJ, "shape"),
        tensors(lambda state: state.update({V_PROJ: state[V_PROJ][None]})),
    ),
    Case(
        "tensor-transposed",
        CONVERT,
        (V_PROJ, "shape"),
        tensors(lambda state: state.update({V_PROJ: state[V_PROJ].T.contiguous()})),
    ),
    Case(
        "tensor-empty",
        CONVERT,
        (V_PROJ, "shape"),
        tensors(lambda state: state.update({V_PROJ: state[V_PROJ][:0].clone()})),
    ),
    Case("tensor-a-number", CONVERT, (NORM, "shape"), tensors(lambda state: state.update({NORM: torch.tensor(1.0)}))),
    Case("tensor-renamed", CONVERT, (EXTRA, "MODEL.LAYERS.3"), renamed(V_PROJ, V_PROJ.upper())),
    Case(
        "tensor-extra",
        CONVERT,
        (EXTRA, "layers.9"),
        tensors(lambda state: state.update({V_PROJ.replace("3", "9"): state[V_PROJ].clone()})),
    ),
    Case(
        "tensor-extra-bias",
        CONVERT,
        (EXTRA, "v_proj.bias"),
        tensors(lambda state: state.update({V_PROJ.replace("weight", "bias"): torch.ones(32)})),
    ),
    Case(
        "embeddings-missing",
        CONVERT,
        (ABSENT, "embed_tokens"),
        tensors(lambda state: state.pop("model.embed_tokens.weight")),
    ),
    Case("norm-missing", f"{EVAL} {{valid}}", (ABSENT, NORM), tensors(lambda state: state.pop(NORM))),
    Case("no-tensors", CONVERT, ("{model}",), tensors(lambda state: state.clear())),
    Case("layers-left-out", CONVERT, (EXTRA, "layers.3"), config(num_hidden_layers=3)),
    Case("vocabulary-huge", CONVERT, ("config.json describes", "embed_tokens", "10000000"), config(vocab_size=10**7)),
    Case("width-huge-generate", f"{GENERATE} Once", ("config.json describes", "mlp"), config(intermediate_size=10**7)),
    Case(
        "layers-billion-eval",
        f"{EVAL} {{valid}}",
        ("{model}/config.json", "num_hidden_layers", "1000"),
        config(num_hidden_layers=10**9),
    ),
    Case("layers-billion-generate", f"{GENERATE} Once", ("num_hidden_layers", "1000"), config(num_hidden_layers=10**9)),
    Case(
        "heads-zero-eval",
        f"{EVAL} {{valid}}",
        ("{model}/config.json", "num_attention_heads", "0"),
        config(num_attention_heads=0),
    ),
    Case(
        "against-layers-billion",
        f"{EVAL} {{valid}} --against {{tmp}}/larger/model",
        ("{tmp}/larger/model/config.json", "num_hidden_layers"),
        all_of(larger_vocabulary, below("larger", config(num_hidden_layers=10**9))),
    ),
]


def first(part: str, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[dict[str, torch.Tensor]], None]:
    """Edits the first tensor with ``part`` in its name, in place or by what is returned; None takes it out."""

    def change(state: dict[str, torch.Tensor]) -> None:
        name = next(name for name in sorted(state) if part in name)
        if (tensor := edit(state.pop(name))) is not None:
            state[name] = tensor

    return change


FUSED = {
    "gpt2": "attn.c_attn.weight",
    "falcon": "query_key_value.weight",
    "gpt_neox": "query_key_value.weight",
    "bloom": "query_key_value.weight",
    "jamba": "self_attn.v_proj.weight",
    "gemma2": "self_attn.v_proj.weight",
}
EDITS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor | None]]] = {
    "missing": (ABSENT, lambda tensor: None),
    "shape": ("shape", lambda tensor: tensor[:-1].clone()),
    "nan": ("NaN", lambda tensor: tensor.fill_(float("nan"))),
    "int8": ("I8", lambda tensor: tensor.to(torch.int8)),
}
LAYERS = {
    "gpt2": "n_layer",
    "falcon": "num_hidden_layers",
    "gpt_neox": "num_hidden_layers",
    "bloom": "n_layer",
    "gemma2": "num_hidden_layers",
}
FAMILY_WEIGHTS = [
    Case(f"{family}-tensor-{kind}", CONVERT, ("{model}", part, word), tiny(family, first(part, edit)))
    for family, part in FUSED.items()
    for kind, (word, edit) in EDITS.items()
] + [
    Case(
        f"{family}-layer-too-many",
        CONVERT,
        ("{model}", EXTRA),
        tiny(family, **{field: 1}, **({"layer_types": ["full_attention"]} if family == "gemma2" else {})),
    )
    for family, field in LAYERS.items()
]
