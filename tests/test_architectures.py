"""Models of Hugging Face, small and with random weights, through compress, save and load."""

import copy

import pytest
import torch
import transformers as hf
from helpers import U32, assert_same_bits

import pyengine as pe

VOCABULARY = 99
TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {**TEXT, "intermediate_size": 64, "max_position_embeddings": 40}
IMAGES = {"hidden_act": "gelu", "num_labels": 7}

# Name -> class, configuration, how many layers are packed, types that are left.
CASES = {
    "bert": (hf.BertModel, hf.BertConfig(**WIDE), 15, {"Embedding"}),
    "distilbert": (
        hf.DistilBertModel,
        hf.DistilBertConfig(
            vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=40
        ),
        14, set(),
    ),
    # The word embeddings are the weight of the decoder.
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig(**WIDE), 14, {"Embedding", "Linear"}),
    "t5": (
        hf.T5ForConditionalGeneration,
        hf.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
                    decoder_start_token_id=0),
        34, {"Embedding", "Linear"},
    ),
    "llama": (
        hf.LlamaForCausalLM,
        hf.LlamaConfig(**WIDE, num_key_value_heads=1, tie_word_embeddings=False),
        16, set(),
    ),
    "gpt2": (
        hf.GPT2LMHeadModel,
        hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=40),
        1, {"Conv1D", "Embedding", "Linear"},
    ),
    "resnet": (
        hf.ResNetForImageClassification,
        hf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=7),
        1, {"Conv2d"},
    ),
    "mobilenet_v2": (
        hf.MobileNetV2ForImageClassification,
        hf.MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=7),
        1, {"Conv2d"},
    ),
    "efficientnet": (
        hf.EfficientNetForImageClassification,
        hf.EfficientNetConfig(image_size=32, width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320,
                              num_labels=7),
        1, {"Conv2d", "EfficientNetDepthwiseConv2d"},
    ),
    "convnext": (
        hf.ConvNextForImageClassification,
        hf.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, image_size=32, num_labels=7),
        5, {"Conv2d"},
    ),
    "vit": (
        hf.ViTForImageClassification,
        hf.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                     image_size=32, patch_size=8, num_labels=7),
        13, {"Conv2d", "ViTEmbeddings"},
    ),
}  # fmt: skip
VISION = ("resnet", "mobilenet_v2", "efficientnet", "convnext", "vit")


def build(name, seed=0):
    """The model in eval mode. Convolutions and batch norms get torch's own first weights and the statistics
    of the batch: with those that these models start from, features fade to 1e-27. Biases are not 0.
    """
    torch.manual_seed(seed)
    kind, config, *_ = CASES[name]
    model = kind(config)
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.BatchNorm2d)):
            module.reset_parameters()
            module.momentum = None
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            torch.nn.init.normal_(module.bias, std=0.1)
    if name in VISION:
        run(model.train(), name)
    return model.eval()


def batch(name):
    generator = torch.Generator().manual_seed(1)
    if name in VISION:
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    more = {"decoder_input_ids": ids[:, :5]} if name == "t5" else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


def run(model, name):
    with torch.no_grad():
        return model(**batch(name))[0]


def relative_error(y, reference):
    return ((y - reference).norm() / reference.norm()).item()


def with_dequantized_weights(model, packed, report):
    """A float model with the weights that the packed one has."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for change in report.changes:
            twin.get_submodule(change.name).weight.copy_(packed.get_submodule(change.name).weight)
    return twin


@pytest.fixture(autouse=True)
def one_thread(torch_threads):
    torch_threads(1)


@pytest.mark.parametrize("name", CASES)
def test_every_layer_with_a_matrix_is_packed_or_listed(name):
    model = build(name)
    matrices = {n for n, m in model.named_modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))}
    packed, report = pe.compress(model, "w8a8")
    changed, left = {change.name for change in report.changes}, {item.name for item in report.left}
    assert changed | left == matrices
    assert not changed & left
    *_, count, kinds = CASES[name]
    assert (len(changed), {item.kind for item in report.left}) == (count, kinds)
    for layer in changed:
        assert isinstance(packed.get_submodule(layer), (pe.nn.Linear, pe.nn.Embedding))
    for layer in left:
        assert type(packed.get_submodule(layer)) is type(model.get_submodule(layer))


@pytest.mark.parametrize("scheme", ["w8", "w8a8"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_stay_close_to_float(name, scheme):
    """Rounding to 1/127 of the largest of K values is off by a / 127 / sqrt(12) of their rms, where a, the
    largest over the rms, is below 4.4 here: 1 % for the weights, 1 % for the activations. In L layers that
    adds up to sqrt(L) times as much at most. The outputs are few: half as much again for chance.
    """
    model = build(name)
    expected = run(model, name)
    packed, report = pe.compress(model, scheme)
    y, layers = run(packed, name), len(report.changes)
    error = relative_error(y, expected)
    bound = 1.5 * (0.01 if scheme == "w8" else 0.0142) * layers**0.5
    assert 0 < error < bound, f"{name} {scheme}: relative error {error:.4f}, bound {bound:.4f}"
    if scheme == "w8":
        # Beside the weights only the order of float sums differs: K units in each layer.
        twin = with_dequantized_weights(model, packed, report)
        k = max(packed.get_submodule(change.name).weight.shape[1] for change in report.changes)
        error, bound = relative_error(y, run(twin, name)), 4 * layers * k * U32
        assert error < bound, f"{name}: {error:.2e} from its own weights, bound {bound:.2e}"


@pytest.mark.parametrize("scheme", ["w8", "w8a8"])
@pytest.mark.parametrize("name", CASES)
def test_a_saved_model_gives_exactly_the_same_again(name, scheme, tmp_path):
    packed, report = pe.compress(build(name), scheme)
    expected, file = run(packed, name), tmp_path / "model.safetensors"
    pe.save(packed, file)
    assert_same_bits(run(packed, name), expected)
    kind, config, *_ = CASES[name]
    devices = []

    def factory():
        devices.append(torch.get_default_device().type)
        return kind(config)

    mapped = pe.load(file, factory)
    assert devices == ["meta"]
    assert not mapped.training
    into = build(name, seed=7)
    assert relative_error(run(into, name), expected) > 0.3
    assert pe.load(file, into, mmap=False) is into
    copied = pe.load(file, factory, mmap=False)
    for model in (mapped, into, copied):
        assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
        for change in report.changes:
            assert model.get_submodule(change.name).kernel == change.kernel
        state = model.state_dict()
        assert state.keys() == packed.state_dict().keys()
        for key, tensor in packed.state_dict().items():
            assert_same_bits(state[key], tensor)
    for model in (into, copied):
        assert_same_bits(run(model, name), expected)
    # On a mapped file float tensors are aligned to 8 bytes only, and torch's own float kernels may then add
    # in another order: 1e-4 is a thousand units, for what many layers make of one.
    assert relative_error(run(mapped, name), expected) < 1e-4
