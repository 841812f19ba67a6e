"""Names that families give to an attention module and its projections."""

from __future__ import annotations

PATHS = ("self_attn", "norm_attn_norm.attn", "attn.attention", "attn", "attention", "self_attention", "mixer")
SEPARATE = ("q_proj", "k_proj", "v_proj")
FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "Wo")
DOWNS = ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "w2", "Wo")
