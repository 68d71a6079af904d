"""InternVL-Chat 1.5 beside HF's InternVL, in the form of the large release and in that of the small ones."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.zoo.harness import Size, System, difference, jittered, reloaded
from tests.zoo.llava import IMAGE, VOCABULARY, beside, foreign, inputs, llama_config, spliced_batch


def vision_config(**changes: Any) -> Any:
    """A small InternViT's: 36 patches, of which 9 tokens become; the large kind."""
    from transformers import InternVLVisionConfig

    sizes = {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 24, "patch_size": 4, "norm_type": "rms_norm", "use_qk_norm": True,
    }
    return InternVLVisionConfig(**{**sizes, **changes})


def qwen2_config() -> Any:
    """A small HF Qwen2's, whose head is its word embedding."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )


def tiny_hf(text: Any = None, vision: Any = None, **changes: Any) -> Any:
    """A small HF InternVL with noise on every parameter."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    torch.manual_seed(0)
    config = InternVLConfig(
        text_config=text or llama_config(), vision_config=vision or vision_config(),
        **{"image_token_id": IMAGE, "image_seq_length": 9, "tie_word_embeddings": False, **changes},
    )
    return jittered(InternVLForConditionalGeneration(config))


@torch.no_grad()
def parity() -> dict[str, float]:
    """Features, logits, the loss and generation; the same with the small releases' parts; then other features."""
    batch = spliced_batch(9, 24)
    small = {"norm_type": "layer_norm", "use_qk_norm": False, "attention_bias": True}
    references = {
        "": tiny_hf(),
        ", small": tiny_hf(qwen2_config(), vision_config(**small), tie_word_embeddings=True),
    }
    others = {
        "final norm": tiny_hf(vision=vision_config(**small, use_mean_pooling=False)),
        "layer -2": tiny_hf(vision_feature_layer=-2),
        "layer -2 and a norm that is not read": tiny_hf(
            vision=vision_config(**small, use_mean_pooling=False), vision_feature_layer=-2
        ),
    }
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for index, (form, reference) in enumerate(references.items()):
            model = reloaded(reference, Path(folder) / f"form{index}")
            features = reference.get_image_features(batch["images"]).pooler_output
            differences = {
                "image features": difference(model.get_mixin("image").encode(batch["images"]), features),
                **beside(model, reference, batch),
            }
            found |= {f"{what}{form}": value for what, value in differences.items()}
        real = batch["attention_mask"].bool()
        for index, (what, reference) in enumerate(others.items()):
            model, theirs = reloaded(reference, Path(folder) / f"other{index}"), reference(**foreign(inputs(batch)))
            found[f"logits with {what}"] = difference(model(**inputs(batch))[real], theirs.logits[real])
    return found


SYSTEM = System(
    name="InternVL-Chat 1.5",
    key="internvl",
    family="splice",
    paper="2404.16821",
    model="models.internvl:InternVL",
    loss="next token of text, not at pictures",
    reference="HF InternVL",
    parity=parity,
    sizes={
        "26B": Size(25_514_186_112, "HF's count (listed as 25.5B)"),
        "Mini 2B": Size(2_205_754_368, "HF's count (listed as 2.2B)", "mini_2b.yaml"),
    },
    chats=True,
    images=True,
)
