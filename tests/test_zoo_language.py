"""GPT-2, BERT and the LLaMA family: folders of HF both ways, stretched positions, generation, and their mixins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixformer import BaseMixin, BaseModel, KVCache, generate
from mixformer.checkpoint import from_pretrained, recognise, save_pretrained
from mixformer.config import TransformerConfig
from mixformer.mixins import (
    EncoderCrossAttentionMixin,
    MLMHeadMixin,
    RotaryMixin,
    SlidingWindowMixin,
    TokenTypeMixin,
)
from mixformer.rope import RotaryScaling
from mixformer.testing import check_mixin, jitter, tiny_model
from models.bert import BERTConfig
from models.gpt2 import GPT2Config
from models.llama import LLaMAConfig
from models.weights import bert, gpt2
from models.weights.rules import respelled, spelling
from tests.zoo.bert import rows_alone, their_inputs, tiny_bert
from tests.zoo.bert import sample as two_segments
from tests.zoo.gpt2 import features, tiny_gpt2
from tests.zoo.harness import TOLERANCE, difference
from tests.zoo.llama import VARIANTS, padded, reference_of
from tests.zoo.llama import sample as ids_of

REFERENCES: dict[str, Callable[[], Any]] = {
    "gpt2": tiny_gpt2,
    "gpt2 with cross attention": lambda: tiny_gpt2(add_cross_attention=True),
    "bert": tiny_bert,
    "bert without sentences": lambda: tiny_bert("BertForMaskedLM"),
    **{variant: lambda variant=variant: reference_of(variant) for variant in VARIANTS},  # type: ignore[misc]
}
each_reference = pytest.mark.parametrize("what", list(REFERENCES))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_files(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


def loaded_by_transformers(folder: Path) -> Any:
    """The class that config.json names, with every weight found and none left over."""
    import transformers

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def logits_of(reference: Any, ids: torch.Tensor) -> torch.Tensor:
    out = reference(ids)
    return out.prediction_logits if "prediction_logits" in out else out.logits


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "in"


# ------------------------------------------------------------------------ HF folders


@each_reference
def test_folders_are_written_back_bit_for_bit_and_load_again(what: str, folder: Path, tmp_path: Path) -> None:
    reference = REFERENCES[what]()
    reference.save_pretrained(folder)
    save_pretrained(from_pretrained(folder), tmp_path / "own")
    save_pretrained(from_pretrained(tmp_path / "own"), tmp_path / "out", format="hf")
    assert_same_files(tensors_of(tmp_path / "out"), tensors_of(folder))
    written, original = (json.loads((place / "config.json").read_text()) for place in (tmp_path / "out", folder))
    assert written == original
    with torch.no_grad():
        again = loaded_by_transformers(tmp_path / "out")
        assert torch.equal(logits_of(again, ids_of()), logits_of(reference, ids_of()))


SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "inner_hidden_size": 48}
LLAMA3 = RotaryScaling("llama3", 8.0, 32)
YARN_OF_MAX = RotaryScaling("yarn", 2.0)
YARN = RotaryScaling("yarn", 4.0, 16, beta_fast=8.0, attention_factor=1.5)
COMPOSED: dict[str, tuple[TransformerConfig, str]] = {
    "gpt2": (GPT2Config(**SIZES, max_positions=64), "hf-gpt2"),
    "gpt2 with cross attention": (GPT2Config(**SIZES, max_positions=64, cross_attention=True), "hf-gpt2"),
    "gpt2 with a head": (GPT2Config(**SIZES, max_positions=64, tied_head=False), "hf-gpt2"),
    "bert": (BERTConfig(**SIZES, max_positions=40), "hf-bert"),
    "bert without sentences": (BERTConfig(**SIZES, max_positions=40, next_sentence=False, num_segments=1), "hf-bert"),
    "llama with biases": (LLaMAConfig(**SIZES, num_kv_heads=2, bias="all"), "hf-llama"),
    "llama with some biases": (LLaMAConfig(**SIZES, head_size=6, bias="mlp", tied_head=True), "hf-llama"),
    "llama 3": (LLaMAConfig(**SIZES, rope_base=500.0, rope_scaling=LLAMA3), "hf-llama"),
    "llama, yarn": (LLaMAConfig(**SIZES, rope_scaling=YARN), "hf-llama"),
    "llama, dynamic": (LLaMAConfig(**SIZES, max_positions=8, rope_scaling=RotaryScaling("dynamic", 2.0)), "hf-llama"),
    "mistral": (LLaMAConfig(**SIZES, num_kv_heads=2, head_size=12, sliding_window=4), "hf-mistral"),
    "qwen2": (LLaMAConfig(**SIZES, num_kv_heads=2, bias="qkv", rope_base=1e6), "hf-qwen2"),
    "qwen2 with a window": (LLaMAConfig(**SIZES, bias="qkv", sliding_window=5), "hf-qwen2"),
}


@pytest.mark.parametrize("what", list(COMPOSED))
def test_what_was_composed_here_is_written_as_transformers_reads_it(what: str, tmp_path: Path) -> None:
    config, name = COMPOSED[what]
    model = config.build(generator=torch.Generator().manual_seed(0)).eval()
    jitter(model)
    save_pretrained(model, tmp_path / "out", format="hf")
    assert recognise(tmp_path / "out") == name
    assert from_pretrained(tmp_path / "out").config == config
    with torch.no_grad():
        theirs = logits_of(loaded_by_transformers(tmp_path / "out"), ids_of())
        torch.testing.assert_close(model(ids_of()), theirs, atol=2e-5, rtol=0)


def published_gpt2(folder: Path) -> dict[str, torch.Tensor]:
    """The layout of the released gpt2: no prefix, and the causal masks of every layer."""
    tiny_gpt2().save_pretrained(folder)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(folder).items()}
    for i in range(2):
        tensors[f"h.{i}.attn.bias"] = torch.ones(64, 64).tril()[None, None]
    return tensors


def published_bert(folder: Path) -> dict[str, torch.Tensor]:
    """The layout of the released bert-base-uncased: old names of norms, the tied projection stored again."""
    tiny_bert().save_pretrained(folder)
    edit_config(folder, architectures=["BertForMaskedLM"])
    tensors = tensors_of(folder)
    for name in [name for name in tensors if "LayerNorm" in name]:
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        tensors[old] = tensors.pop(name)
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    tensors["bert.embeddings.position_ids"] = torch.arange(40)[None]
    return tensors


@pytest.mark.parametrize(("publish", "reference"), [(published_gpt2, tiny_gpt2), (published_bert, tiny_bert)])
def test_published_layouts_are_read_and_written_back(
    publish: Callable[[Path], dict[str, torch.Tensor]], reference: Callable[[], Any], folder: Path, tmp_path: Path
) -> None:
    tensors = publish(folder)
    save_file(tensors, folder / "model.safetensors")
    model = from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(model(ids_of()), logits_of(reference(), ids_of()), atol=2e-5, rtol=0)
    save_pretrained(model, tmp_path / "own")
    save_pretrained(from_pretrained(tmp_path / "own"), tmp_path / "out", format="hf")
    assert_same_files(tensors_of(tmp_path / "out"), tensors)


OLD_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
OLD_KEYS: list[tuple[str, dict[str, Any]]] = [
    ("Qwen2", {"rope_theta": 1e6, "rope_scaling": OLD_YARN}),
    ("Qwen2", {"rope_theta": 1e6, "sliding_window": 4, "max_window_layers": 0, "use_sliding_window": False}),
    ("LLaMA", {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("LLaMA", {"rope_theta": 5e5, "rope_scaling": None, "sliding_window": 3}),
]


@pytest.mark.parametrize(("what", "keys"), OLD_KEYS, ids=[f"{i}-{case[0]}" for i, case in enumerate(OLD_KEYS)])
def test_configs_of_older_transformers_mean_the_same(what: str, keys: dict[str, Any], folder: Path) -> None:
    REFERENCES[what]().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "layer_types"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    with torch.no_grad():
        theirs = loaded_by_transformers(folder)(ids_of()).logits
        torch.testing.assert_close(from_pretrained(folder)(ids_of()), theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "ours"), [("GPT2", gpt2.write_config(GPT2Config())), ("Bert", bert.write_config(BERTConfig()))]
)
def test_the_defaults_are_those_of_the_release(kind: str, ours: dict[str, Any]) -> None:
    import transformers

    theirs = getattr(transformers, f"{kind}Config")().to_dict()
    shared = {key: value for key, value in ours.items() if key in theirs and key != "architectures"}
    assert len(shared) >= 12
    assert shared == {key: theirs[key] for key in shared}


def test_a_pooler_that_no_head_uses_is_carried_along(folder: Path, tmp_path: Path) -> None:
    tiny_bert().save_pretrained(folder)
    tensors = {name: x for name, x in tensors_of(folder).items() if "seq_relationship" not in name}
    save_file(tensors, folder / "model.safetensors")
    model = from_pretrained(folder)
    assert list(model.mixins) == ["segments", "head"]
    save_pretrained(model, tmp_path / "out", format="hf")
    assert_same_files(tensors_of(tmp_path / "out"), tensors)


def test_two_spellings_of_one_tensor_are_refused(folder: Path) -> None:
    tiny_gpt2().save_pretrained(folder)
    tensors = tensors_of(folder)
    save_file({**tensors, "ln_f.bias": torch.zeros(32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"ln_f\.bias' are two spellings of one tensor"):
        from_pretrained(folder)


def test_spellings_keep_the_numbers_of_layers_and_what_differs_elsewhere() -> None:
    files = {
        "h.0.ln_1.bias": "transformer.h.0.ln_1.bias",
        "h.11.ln_1.bias": "transformer.h.11.ln_1.bias",
        "wte.weight": "wte.weight",
        "projector.norm": "mlp1.0",
        "h.3.odd": "h.3.odd",
        "h.4.odd": "block.h.4.odd",
    }
    found = spelling(files)
    assert {name: respelled(name, found) for name in files} == files
    assert respelled("h.12.ln_1.bias", found) == "transformer.h.12.ln_1.bias"


def test_a_head_that_is_called_tied_and_is_not_is_refused(folder: Path) -> None:
    reference_of("Qwen2 with a tied head").save_pretrained(folder)
    tensors = tensors_of(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight' differs from 'model\.embed_tokens\.weight'"):
        from_pretrained(folder)


ODD: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "attention is scaled by layer"),
    ("gpt2", {"scale_attn_weights": False}, "attention is scaled by layer, or not at all"),
    ("gpt2", {"activation_function": "gelu_slow"}, "activation 'gelu_slow' is not known"),
    ("gpt2", {"n_inner": 44}, r"of another shape.*\n*.*h\.0\.mlp\.c_fc"),
    ("gpt2", {"add_cross_attention": True}, r"missing, mixin 'cross'"),
    ("bert", {"is_decoder": True}, "is_decoder: false"),
    ("bert", {"position_embedding_type": "relative_key"}, "'relative_key'; supported are 'absolute'"),
    ("bert", {"tie_word_embeddings": False}, "not tied"),
    ("bert", {"num_hidden_layers": 3}, r"layer\.2\.attention\.self\.query\.weight"),
    ("LLaMA", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "scaled in a way"),
    ("LLaMA", {"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor is 0.5; it must be at least 1"),
    ("LLaMA", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "part of each head"),
    ("LLaMA", {"rope_parameters": {**OLD_YARN, "mscale": 1, "mscale_all_dim": 2}}, "two temperatures"),
    ("LLaMA", {"attention_bias": True}, r"missing.*q_proj\.bias"),
    (
        "Qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4, "layer_types": None},
        r"its layers \[1\] attend to the latest 4",
    ),
    (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        r"its layers \[0\] attend to the latest 4",
    ),
]


@pytest.mark.parametrize(("what", "changes", "message"), ODD)
def test_odd_variants_are_refused_with_the_reason(
    what: str, changes: dict[str, Any], message: str, folder: Path
) -> None:
    REFERENCES[what]().save_pretrained(folder)
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("config", "option"),
    [
        (LLaMAConfig(**SIZES, bias="except_qkv"), "bias"),
        (LLaMAConfig(**SIZES, bias="all", sliding_window=4), "sliding_window"),
        (LLaMAConfig(**SIZES, rope_scaling=RotaryScaling("dynamic", 2.0, 16)), r"rope_scaling\.original_positions"),
        (GPT2Config(**SIZES, cross_attention=True, feature_size=12), "feature_size"),
        (BERTConfig(**SIZES, norm_order="pre"), "norm_order"),
    ],
)
def test_what_no_hf_config_can_say_is_not_written(config: TransformerConfig, option: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"cannot hold the value of .*{option}"):
        save_pretrained(config.build(), tmp_path / "out", format="hf")


# ------------------------------------------------------------------------ stretched positions


SCALINGS: list[tuple[RotaryScaling, dict[str, Any]]] = [
    (RotaryScaling("linear", 4.0), {}),
    (RotaryScaling("llama3", 8.0, 8192), {
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }),
    (RotaryScaling("llama3", 32.0, 4096, low_frequency_factor=2.0, high_frequency_factor=8.0), {
        "low_freq_factor": 2.0, "high_freq_factor": 8.0, "original_max_position_embeddings": 4096,
    }),
    (RotaryScaling("yarn", 4.0, 32768), {"original_max_position_embeddings": 32768}),
    (RotaryScaling("yarn", 16.0, 2048, beta_fast=24.0, beta_slow=2.0, truncate=False, attention_factor=1.25), {
        "original_max_position_embeddings": 2048, "beta_fast": 24.0, "beta_slow": 2.0, "truncate": False,
        "attention_factor": 1.25,
    }),
]


@pytest.mark.parametrize(("scaling", "theirs"), SCALINGS, ids=[f"{i}-{s[0].kind}" for i, s in enumerate(SCALINGS)])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_frequencies_are_those_of_transformers(scaling: RotaryScaling, theirs: dict[str, Any], base: float) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": scaling.kind, "factor": scaling.factor, "rope_theta": base, **theirs}
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, max_position_embeddings=131072, rope_parameters=rope)
    expected, temperature = ROPE_INIT_FUNCTIONS[scaling.kind](config)
    sizes = {**SIZES, "hidden_size": 256, "num_heads": 2}
    mixin = LLaMAConfig(**sizes, rope_base=base, rope_scaling=scaling).build().get_mixin("rotary")
    torch.testing.assert_close(mixin.frequencies(torch.device("cpu")), expected, atol=0, rtol=2e-6)
    assert scaling.temperature == pytest.approx(temperature, abs=1e-12)


def test_kept_tables_of_different_scalings_stay_apart() -> None:
    ids, logits = ids_of(), []
    kinds = [RotaryScaling(), *(scaling for scaling, _ in SCALINGS[:2]), RotaryScaling("yarn", 4.0, 16)]
    for scaling in kinds * 2:
        model = LLaMAConfig(**SIZES, rope_scaling=scaling).build(generator=torch.Generator().manual_seed(0))
        jitter(model)
        logits.append(model(ids))
        explicit = torch.arange(ids.shape[1])[None].expand(2, -1)  # given positions are computed anew
        torch.testing.assert_close(model(ids, position_ids=explicit), logits[-1], atol=1e-6, rtol=0)
    for index in range(len(kinds)):
        assert torch.equal(logits[index], logits[index + len(kinds)])
        assert not any(torch.equal(logits[index], other) for other in logits[index + 1 : len(kinds)])


def test_dynamic_positions_are_plain_up_to_the_trained_length_and_follow_each_row_beyond() -> None:
    plain = LLaMAConfig(**SIZES, max_positions=8).build(generator=torch.Generator().manual_seed(0)).eval()
    jitter(plain)
    stretched = LLaMAConfig(**SIZES, max_positions=8, rope_scaling=RotaryScaling("dynamic", 2.0)).build().eval()
    stretched.load_state_dict(plain.state_dict())
    ids = ids_of()
    assert torch.equal(stretched(ids[:, :8]), plain(ids[:, :8]))
    difference = (stretched(ids) - plain(ids)).abs().max()
    assert difference > 1e-3
    batch = padded(ids, "left", num_padded=6)
    found = stretched(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(found[1, 6:], plain(ids[1:, 6:])[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(found[0], stretched(ids[:1])[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RotaryScaling("ntk"), "kind is 'ntk'; choose one of none, linear, dynamic, llama3, yarn"),
        (lambda: RotaryScaling("linear", 0.5), "factor is 0.5; it must be at least 1"),
        (lambda: RotaryScaling("llama3", 8.0, low_frequency_factor=4.0), "must be below high_frequency_factor"),
        (lambda: RotaryMixin(1e4, "released", RotaryScaling("dynamic", 2.0)), "cannot be stretched row by row"),
        (lambda: SlidingWindowMixin(0), "sees at least itself"),
        (lambda: TokenTypeMixin(0), "one kind at least"),
        (lambda: LLaMAConfig(**SIZES, max_positions=0, rope_scaling=YARN_OF_MAX).build(), "original_positions"),
        (lambda: LLaMAConfig(**SIZES, head_size=2, rope_scaling=RotaryScaling("dynamic", 2.0)).build(), "above 2"),
        (lambda: GPT2Config(**{**SIZES, "hidden_size": 30, "num_heads": 3}).build().add_mixin(
            "cross", EncoderCrossAttentionMixin(compute_size=32)), "width 32 does not divide into 3 heads"),
    ],
)
def test_options_that_make_no_sense_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------ windows, features, segments


def test_a_window_counts_real_tokens_and_leaves_short_rows_alone() -> None:
    model = LLaMAConfig(**SIZES, sliding_window=5).build(generator=torch.Generator().manual_seed(0)).eval()
    jitter(model)
    plain = LLaMAConfig(**SIZES).build().eval()
    plain.load_state_dict(model.state_dict())
    ids = ids_of()
    assert torch.equal(model(ids[:, :5]), plain(ids[:, :5]))
    assert model.plan(ids[:, :5]).mask.allowed(torch.arange(5), torch.arange(5)).sum() == 15
    ids[0, 0] = (ids[0, 0] + 1) % 97  # in two layers, a token reaches 2 * 4 places ahead and no further
    changed = (model(ids) - model(ids_of())).abs().amax(-1)[0] > 0
    assert changed[:9].all() and not changed[9:].any()
    gap = torch.ones_like(ids, dtype=torch.bool)
    gap[:, 4:7] = False
    kept = torch.cat([ids[:, :4], ids[:, 7:]], dim=1)
    torch.testing.assert_close(model(ids, gap)[gap], model(kept).flatten(0, 1), atol=1e-5, rtol=0)


def crossed() -> BaseModel:
    model = GPT2Config(**SIZES, max_positions=64, cross_attention=True, feature_size=12).build()
    jitter(model)
    return model.eval()


def test_rows_without_features_run_as_without_cross_attention() -> None:
    model, ids = crossed(), ids_of()
    given = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0))
    found = model(ids, encoder_hidden_states=given, encoder_attention_mask=torch.tensor([[1, 1, 0], [0, 0, 0]]))
    alone = model(ids[:1], encoder_hidden_states=given[:1, :2])
    torch.testing.assert_close(found[:1], alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(found[1:], model(ids[1:]), atol=1e-6, rtol=0)


def test_features_are_projected_once_and_later_ones_are_seen_beside_them() -> None:
    model, ids = crossed(), ids_of()
    given = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(0))
    cache, calls = KVCache(model, 2, 14), []
    weights = model.transformer.layers[0].mixins["cross"].key_value
    weights.register_forward_hook(lambda *args: calls.append(1))
    model(ids[:, :6], cache=cache, encoder_hidden_states=given[:, :3])
    model(ids[:, 6:9], cache=cache)
    assert len(calls) == 1
    later = model(ids[:, 9:], cache=cache, encoder_hidden_states=given[:, 3:])
    assert len(calls) == 2
    assert not torch.allclose(later, model(ids, encoder_hidden_states=given[:, :3])[:, 9:], atol=1e-3)
    together = cache.memo["cross.k.0"]
    assert together.shape[2] == 4


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"encoder_hidden_states": torch.zeros(3, 4, 12)}, r"\[b, N, c\] with b = 2.*got \(3, 4, 12\)"),
        ({"encoder_hidden_states": torch.zeros(2, 12)}, r"got \(2, 12\)"),
        (
            {"encoder_hidden_states": torch.zeros(2, 4, 12), "encoder_attention_mask": torch.ones(2, 5)},
            r"must be \[b, N\], here \(2, 4\); got \(2, 5\)",
        ),
        ({"encoder_attention_mask": torch.ones(2, 4)}, "'encoder_hidden_states' is missing"),
    ],
)
def test_features_that_do_not_fit_are_refused(inputs: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        crossed()(ids_of(), **inputs)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), r"segment_ids \(2, 3\) must have the shape of input_ids \(2, 14\)"),
        (torch.full((2, 14), 2), "segment_ids go from 2 to 2; this model knows 0 to 1"),
        (torch.full((2, 14), -1), "go from -1 to -1"),
    ],
)
def test_segments_that_do_not_fit_are_refused(segments: torch.Tensor, message: str) -> None:
    model = BERTConfig(**SIZES, max_positions=40).build()
    with pytest.raises(ValueError, match=message):
        model(ids_of(), segment_ids=segments)


def test_masked_words_and_sentences_are_learnt() -> None:
    model = BERTConfig(**SIZES, max_positions=40).build(generator=torch.Generator().manual_seed(0))
    batch = two_segments("right")
    labels = batch["input_ids"].masked_fill(torch.arange(12) % 3 > 0, -100)
    given = {**batch, "labels": labels, "next_sentence_labels": torch.tensor([0, 1])}
    optimizer, totals = torch.optim.Adam(model.parameters(), 5e-3), []
    for _ in range(30):
        optimizer.zero_grad()
        losses = type(model).objective(model, given)
        assert set(losses) == {"masked_language", "next_sentence"}
        total = sum(losses.values())
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.1 * totals[0]


# ------------------------------------------------------------------------ generation


@pytest.mark.parametrize("what", ["gpt2", "gpt2 with cross attention", "Qwen2", "Mistral with a window"])
@pytest.mark.parametrize("side", ["none", "left"])
def test_greedy_generation_equals_transformers(what: str, side: str, folder: Path) -> None:
    reference = REFERENCES[what]()
    reference.save_pretrained(folder)
    model, batch = from_pretrained(folder), {"input_ids": ids_of(), "attention_mask": torch.ones_like(ids_of())}
    if side == "left":
        batch = padded(ids_of(), "left")
        del batch["position_ids"]
    given = features() if "cross" in what else {}
    reference.generation_config.eos_token_id = None
    theirs = reference.generate(**batch, **given, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(generate(model, {**batch, **given}, 12), theirs[:, 14:])
    assert torch.equal(generate(model, {**batch, **given}, 12, cache=False), theirs[:, 14:])


def test_a_left_padded_bert_reads_the_first_real_token_for_its_sentence() -> None:
    model = BERTConfig(**SIZES, max_positions=40).build(generator=torch.Generator().manual_seed(0)).eval()
    jitter(model)
    batch = two_segments("left")
    alone = [model.run(**row).outputs["sentence"] for row in rows_alone(batch)]
    torch.testing.assert_close(model.run(**batch).outputs["sentence"], torch.cat(alone), atol=1e-6, rtol=0)
    assert set(their_inputs(batch)) == {"input_ids", "attention_mask", "token_type_ids", "position_ids"}


# ------------------------------------------------------------------------ every property


def given_features(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Features of a row, and how many of them are real, which follow from its tokens."""
    generator = torch.Generator().manual_seed(int(ids.sum()))
    mask = (torch.arange(5) < 2 + int(ids[0, 0]) % 4)[None]
    return {
        "encoder_hidden_states": torch.randn(1, 5, 12, generator=generator), "encoder_attention_mask": mask,
    }


def plain_backbone() -> BaseModel:
    config = TransformerConfig(
        vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, positions="learned", max_positions=64
    )
    return config.build(generator=torch.Generator().manual_seed(0))


def tiny_llama() -> BaseModel:
    return tiny_model("llama")


def tiny_encoder() -> BaseModel:
    config = BERTConfig(**{**SIZES, "vocab_size": 61}, max_positions=64, next_sentence=False)
    return config.build(generator=torch.Generator().manual_seed(0))


Case = tuple[str, Callable[[], BaseMixin], Callable[[], BaseModel], dict[str, Any]]
WITH_FEATURES = {"extra_inputs": given_features}
SEGMENTS = {"extra_inputs": lambda ids: {"segment_ids": (ids > 30).long()}}
CASES: list[Case] = [
    ("features-plain", lambda: EncoderCrossAttentionMixin(12), plain_backbone, WITH_FEATURES),
    ("features-llama", lambda: EncoderCrossAttentionMixin(12, 24, 2, False), tiny_llama, WITH_FEATURES),
    ("features-cogagent", lambda: EncoderCrossAttentionMixin(12), lambda: tiny_model("cogagent"), WITH_FEATURES),
    ("features-one layer", lambda: EncoderCrossAttentionMixin(12), plain_backbone, {**WITH_FEATURES, "layers": [1]}),
    ("segments-plain", TokenTypeMixin, plain_backbone, SEGMENTS),
    ("segments-llama", TokenTypeMixin, tiny_llama, SEGMENTS),
    ("segments-bert", TokenTypeMixin, tiny_encoder, {**SEGMENTS, "replacing": "segments"}),
    ("words-plain", MLMHeadMixin, plain_backbone, {}),
    ("words-llama", MLMHeadMixin, tiny_llama, {}),
    ("words-bert", MLMHeadMixin, tiny_encoder, {"replacing": "head"}),
    ("window-llama", lambda: SlidingWindowMixin(4), tiny_llama, {}),
    ("window-cogagent", lambda: SlidingWindowMixin(6), lambda: tiny_model("cogagent"), {}),
]
for kind in ("linear", "llama3", "yarn"):
    scaling = RotaryScaling(kind, 4.0, 6)
    CASES.append((
        f"rotary-{kind}", lambda scaling=scaling: RotaryMixin(1e4, scaling=scaling),  # type: ignore[misc]
        tiny_llama, {"replacing": "rotary"},
    ))


@pytest.mark.parametrize(("make_mixin", "model", "options"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_every_property_holds(
    make_mixin: Callable[[], BaseMixin], model: Callable[[], BaseModel], options: dict[str, Any]
) -> None:
    report = check_mixin(make_mixin, model, **options)
    applied = [key for key, value in report.items() if not isinstance(value, str)]
    assert len(applied) >= 7, str(report)


def test_compiled_equals_eager_with_features_windows_and_scaling() -> None:
    for make_mixin, options in (
        (lambda: EncoderCrossAttentionMixin(12), {**WITH_FEATURES}),
        (lambda: SlidingWindowMixin(4), {}),
        (lambda: RotaryMixin(1e4, scaling=RotaryScaling("yarn", 4.0, 6)), {"replacing": "rotary"}),
        (lambda: RotaryMixin(1e4, scaling=RotaryScaling("dynamic", 4.0, 64)), {"replacing": "rotary"}),
    ):
        report = check_mixin(make_mixin, tiny_llama, compile=True, **options)  # type: ignore[arg-type]
        assert isinstance(report["compiled equals eager"], float)


def test_the_scaling_that_transformers_reads_first_counts(folder: Path) -> None:
    reference = reference_of("LLaMA")
    reference.save_pretrained(folder)
    edit_config(folder, rope_scaling={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    from transformers import LlamaForCausalLM

    theirs, ids = LlamaForCausalLM.from_pretrained(folder).eval(), torch.arange(12)[None]
    ours = from_pretrained(folder)
    with torch.no_grad():
        assert difference(ours(ids), theirs(ids).logits) < TOLERANCE
        assert difference(ours(ids), reference(ids).logits) > 100 * TOLERANCE


def test_a_model_type_goes_before_the_architecture(folder: Path) -> None:
    reference_of("LLaMA").save_pretrained(folder)
    edit_config(folder, model_type="gemma")
    with pytest.raises(ValueError, match="gemma"):
        from_pretrained(folder)
