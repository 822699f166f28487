"""The pieces of bench/perplexity.py, on a tiny Llama: no weights and no texts to fetch."""

import math

import pytest
import torch
from gguf import GGUFWriter
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from pyengine.bench import perplexity, smollm2

TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "12", "<|end|>"]
HEADS, KV_HEADS, SIZE = 4, 2, 8  # of a head


def llama(tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HEADS * SIZE,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=1e-4,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def side_by_side(weight, heads):
    """Row i of a head goes to 2 i, row i + SIZE / 2 to 2 i + 1: as llama.cpp's converter does it."""
    source = [i // 2 + i % 2 * SIZE // 2 for i in range(SIZE)]
    return weight[[head * SIZE + i for head in range(heads) for i in source]]


def write_gguf(model, path):
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in TOKENS])
    writer.add_token_merges(["h e", "1 2"])
    tensors = {"token_embd": model.model.embed_tokens.weight, "output_norm": model.model.norm.weight}
    if not config.tie_word_embeddings:
        tensors["output"] = model.lm_head.weight
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        parts = {
            "attn_norm": layer.input_layernorm.weight,
            "attn_q": side_by_side(attention.q_proj.weight, HEADS),
            "attn_k": side_by_side(attention.k_proj.weight, KV_HEADS),
            "attn_v": attention.v_proj.weight,
            "attn_output": attention.o_proj.weight,
            "ffn_norm": layer.post_attention_layernorm.weight,
            "ffn_gate": layer.mlp.gate_proj.weight,
            "ffn_up": layer.mlp.up_proj.weight,
            "ffn_down": layer.mlp.down_proj.weight,
        }
        tensors |= {f"blk.{i}.{name}": tensor for name, tensor in parts.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "head"])
def test_a_llama_that_was_written_as_gguf_computes_the_same(tmp_path, tied):
    model = llama(tied)
    write_gguf(model, tmp_path / "tiny.gguf")
    loaded, tokenizer = smollm2.load(tmp_path / "tiny.gguf")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    ids = torch.randint(0, len(TOKENS), (2, 40))
    with torch.inference_mode():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-4)
    assert tokenizer.encode("the 12<|end|>").tokens == ["t", "he", "Ġ", "1", "2", "<|end|>"]
    assert tokenizer.decode(tokenizer.encode("the größe\n").ids) == "the größe\n"


def test_a_tensor_that_no_llama_has_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'blk\.0\.attn_qkv\.weight'"):
        smollm2.translated("blk.0.attn_qkv.weight")


def test_windows_hold_every_token_once_but_a_last_one_alone():
    def split(count):
        return [window.tolist() for window in perplexity.windows(list(range(count)), 4)]

    assert split(10) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9]]]
    assert split(9) == split(8) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    assert split(1) == split(0) == []


def test_perplexity_is_that_of_all_predictions_together():
    model, ids = llama(True), list(range(11))
    found, count = perplexity.perplexity(model, perplexity.windows(ids, 4))
    lost = []
    for window in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]):
        log = model(torch.tensor([window])).logits.double().log_softmax(-1)[0]
        lost += [-log[i, window[i + 1]].item() for i in range(len(window) - 1)]
    assert count == len(lost) == 8
    assert found == pytest.approx(math.exp(sum(lost) / 8), rel=1e-5)


def test_calibration_takes_the_middle_of_addresses_by_other_presidents_every_other_one_in_pieces():
    names = ["1790_a_b", "1791_a_b", "1862_abraham_lincoln_r", *perplexity.TESTED, "1999_c_d", "2000_short_r"]
    ids = {name: list(range(100 * i, 100 * i + 10)) for i, name in enumerate(names)}
    ids["2000_short_r"] = [1, 2]
    found = [window.tolist() for window in perplexity.calibration(ids, 3, 4, 2)]
    assert found == [[[3, 4, 5, 6]], [[103, 104], [105, 106]], [[603, 604, 605, 606]]]
    assert len(perplexity.calibration(ids, 2, 4, 2)) == 2


def test_rows_tell_what_share_of_the_loss_a_method_recovers(monkeypatch):
    monkeypatch.setattr(perplexity, "CASES", {"w3_g32_asym": ("round", "mse", "awq", "gptq")})
    tested, calibrated = (
        perplexity.windows(torch.randint(0, len(TOKENS), (64,)).tolist(), 16) for _ in range(2)
    )
    full, rounded, *others = perplexity.rows(llama(True), tested, calibrated)
    assert (full["scheme"], rounded["recovered"], rounded["layers"], full["tokens"]) == ("fp32", 0, 14, 60)
    for row in others:
        lost = rounded["perplexity"] - full["perplexity"]
        assert row["recovered"] == pytest.approx((rounded["perplexity"] - row["perplexity"]) / lost)
    some = perplexity.rows(llama(True), tested, calibrated, ["mse"])
    assert [row.get("method") for row in some] == [None, "round", "mse"]


@pytest.mark.parametrize("arguments", [[], ["--texts", "nowhere"]])
def test_what_is_missing_is_said_in_one_line(arguments, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["perplexity", *arguments])
    with pytest.raises(SystemExit) as exit:
        perplexity.main()
    assert exit.value.code == 2
    error = capsys.readouterr().err
    if arguments:
        assert error.count("\n") == 1
    assert "nowhere" in error if arguments else "--texts" in error
