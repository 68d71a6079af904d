"""Frozen, ClipCap and SimVLM: what is trained, what the loss covers, and who sees whom."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mixformer import BaseMixin, KVCache, generate, load_processor
from mixformer.config import read_settings
from mixformer.connectors import ProjectorConfig
from mixformer.mixins import (
    ImageMixin,
    ImagePositionsMixin,
    ImageRelativeBiasMixin,
    PrefixMaskMixin,
    PrefixTuningMixin,
    SlidingWindowMixin,
)
from mixformer.testing import check_mixin, collate, jitter, sample_row, tiny_model
from mixformer.train import TextTask, TrainConfig, train
from models.clipcap import ClipCap
from models.clipcap_transformer import ClipCapTransformer
from models.frozen import Frozen
from models.simvlm import SimVLM
from tests.zoo import git, simvlm
from tests.zoo.clipcap import GOLDEN, mapper_count, mlp_count
from tests.zoo.frozen import tiny
from tests.zoo.harness import CONFIGS, ROOT, System, jittered
from tests.zoo.llava import hf, llama_config, spliced_batch
from tests.zoo.simvlm import IMAGE, Reference, rows, tiny_config

Tensors = dict[str, torch.Tensor]


def small(**changes: Any) -> SimVLM:
    """A tiny SimVLM with noise on every parameter."""
    return jittered(SimVLM(tiny_config(**changes), generator=torch.Generator().manual_seed(0)))


def from_yaml(model_class: Any, name: str) -> Any:
    """The tiny model of a configuration."""
    return read_settings(model_class, CONFIGS / name / "tiny.yaml", [], ()).build_model()


# ---------------------------------------------------------------- Frozen


def test_gradients_go_through_the_language_model_and_leave_it_as_it_is() -> None:
    model, batch = tiny(hf(llama_config())), spliced_batch(2, 16)
    trained = Frozen.stages["encoder"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chosen = {name for name in before if any(fnmatchcase(name, pattern) for pattern in trained.trainable)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    Frozen.objective(model, batch)["language"].backward()  # type: ignore[misc]
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == name.startswith("mixins.image."), name
    train(model, iter([batch] * 2), TrainConfig(steps=2, trainable=trained.trainable, progress=False))
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("mixins.image.")}


def test_the_loss_is_that_of_the_language_model_on_the_words_behind_the_picture() -> None:
    model = tiny(hf(llama_config()))
    ids = torch.tensor([[IMAGE, IMAGE, 4, 9, 2, 77, 5]])
    batch = {"input_ids": ids, "images": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    labels = torch.tensor([[-100, -100, 4, 9, 2, 77, 5]])
    with torch.no_grad():
        expected = F.cross_entropy(model(**batch)[0, 1:-1], ids[0, 2:])
        found = Frozen.objective(model, {**batch, "labels": labels})["language"]  # type: ignore[misc]
    torch.testing.assert_close(found, expected)


def test_pictures_may_stand_anywhere_in_the_text() -> None:
    model, generator = tiny(hf(llama_config())), torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 16, 16, generator=generator)
    ids = torch.tensor([[1, IMAGE, IMAGE, 5, 6, IMAGE, IMAGE, 7]])
    with torch.no_grad():
        moved = model.run(ids, images=images, hidden_layers=("embeddings",)).hidden["embeddings"][0]
        features = model.get_mixin("image").encode(images)  # type: ignore[operator]
        assert model.get_mixin("image").num_features == 2
        assert torch.equal(moved[[1, 2]], features[0]) and torch.equal(moved[[5, 6]], features[1])


# ---------------------------------------------------------------- ClipCap


@pytest.mark.parametrize(
    ("model_class", "name", "learns"),
    [
        (ClipCap, "clipcap", ("mixins.image.projector.", "transformer.")),
        (ClipCapTransformer, "clipcap_transformer", ("mixins.image.projector.",)),
    ],
)
def test_each_form_of_clipcap_trains_what_the_paper_trains(
    model_class: Any, name: str, learns: tuple[str, ...]
) -> None:
    model, stages = from_yaml(model_class, name), model_class.stages
    jitter(model)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    ids = torch.tensor([[5, 5, 5, 5, 20, 21, 22], [5, 5, 5, 5, 23, 24, 25]])
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "images": images, "labels": ids.masked_fill(ids == 5, -100)}
    (stage,) = stages.values()
    config = TrainConfig(steps=1, trainable=stage.trainable, frozen=stage.frozen, progress=False)
    train(model, iter([batch]), config)
    changed = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    assert changed == {key for key in before if key.startswith(learns)}


def test_mappers_have_the_parameters_of_the_released_code() -> None:
    weights = {case: load_file(GOLDEN / case / "weights.safetensors") for case in ("clipcap-mlp", "clipcap-mapper")}
    counts = {
        case: sum(x.numel() for name, x in tensors.items() if name.startswith("clip_project."))
        for case, tensors in weights.items()
    }
    assert counts == {"clipcap-mlp": mlp_count(20, 32, 3), "clipcap-mapper": mapper_count(20, 32, 3, 4, 2)}
    for model_class, expected in ((ClipCap, 31_468_800), (ClipCapTransformer, 41_745_408)):
        projector = model_class(device="meta").get_mixin("image").projector
        assert sum(parameter.numel() for parameter in projector.parameters()) == expected
    assert (mlp_count(512, 768, 10), mapper_count(512, 768, 10, 10, 8)) == (31_468_800, 41_745_408)


def test_token_zero_is_not_learnt() -> None:
    model = from_yaml(ClipCap, "clipcap")
    ids = torch.tensor([[5, 5, 5, 5, 20, 0, 22]])
    labels, images = ids.masked_fill(ids == 5, -100), torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        logits = model(ids, images=images)[0]
        found = ClipCap.objective(model, {"input_ids": ids, "images": images, "labels": labels})  # type: ignore[misc]
    expected = -(logits[3].log_softmax(-1)[20] + logits[5].log_softmax(-1)[22]) / 2
    torch.testing.assert_close(found["language"], expected)


# ---------------------------------------------------------------- SimVLM


def test_without_a_prefix_it_is_a_causal_language_model() -> None:
    reference = Reference()
    ids = torch.randint(2, IMAGE, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference.language(ids).logits
        for given in ({}, {"prefix_lengths": torch.zeros(2, dtype=torch.int64)}):
            torch.testing.assert_close(reference.model(ids, **given), expected, atol=2e-5, rtol=0)


def test_with_nothing_behind_the_prefix_it_attends_to_everything() -> None:
    model, batch = small(), rows()
    full = SimVLM(tiny_config(causal=False)).eval()
    full.load_state_dict(model.state_dict())
    full.del_mixin("prefix")
    real = batch["attention_mask"].bool()
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "images")}
    with torch.no_grad():
        found = model(**given, prefix_lengths=real.sum(1))
        torch.testing.assert_close(found[real], full(**given)[real], atol=2e-5, rtol=0)
        assert not torch.allclose(model(**given)[real], found[real])


def test_tokens_reach_the_prefix_and_what_is_before_them() -> None:
    model = small()
    ids, images = torch.tensor([[7, IMAGE, IMAGE, IMAGE, IMAGE, 3, 8, 9, 4]]), torch.randn(1, 3, 16, 16)
    prefix = 6
    out = model.run(ids, images=images, prefix_lengths=torch.tensor([prefix]), hidden_layers=("embeddings",))
    embeddings = out.hidden["embeddings"]
    for i in range(9):
        (gradient,) = torch.autograd.grad(out.logits[0, i].square().sum(), embeddings, retain_graph=True)
        assert [bool(row.any()) for row in gradient[0]] == [j <= i or (i < prefix and j < prefix) for j in range(9)]
    (gradient,) = torch.autograd.grad(F.cross_entropy(out.logits[0, prefix - 1 : 7], ids[0, prefix:8]), embeddings)
    assert bool(gradient[0, 6].any()) and not bool(gradient[0, 7:].any())


def test_without_lengths_the_prefix_ends_with_the_last_picture() -> None:
    model, batch = small(), rows()
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "images")}
    ends = torch.tensor([4, 10, 0])  # of the pictures, in real tokens
    with torch.no_grad():
        assert torch.equal(model(**given), model(**given, prefix_lengths=ends))


def test_padding_on_the_left_changes_no_row() -> None:
    model, batch = small(), rows()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        together = model(**{name: x for name, x in batch.items() if name != "labels"})
        for row, pictures in enumerate(([0], [1, 2], [])):
            alone: Tensors = {
                "input_ids": batch["input_ids"][row : row + 1, real[row]],
                "prefix_lengths": batch["prefix_lengths"][row : row + 1],
                **({"images": batch["images"][pictures]} if pictures else {}),
            }
            torch.testing.assert_close(model(**alone)[0], together[row, real[row]], atol=2e-5, rtol=0)


def prompts(model: SimVLM) -> Tensors:
    """Two prompts padded on the left, prefixes as a whole."""
    generator = torch.Generator().manual_seed(4)
    batch = collate([sample_row(model, 1, 5, generator), sample_row(model, 2, 3, generator)])
    return {**batch, "prefix_lengths": batch["attention_mask"].sum(1)}


def test_generation_reads_the_prompt_whole_with_a_cache_and_without() -> None:
    model = small()
    jitter(model, seed=1, scale=0.5)
    batch = prompts(model)
    expected = generate(model, batch, max_new_tokens=6, cache=False)
    assert torch.equal(generate(model, batch, max_new_tokens=6), expected)
    causal = generate(model, {**batch, "prefix_lengths": torch.zeros(2, dtype=torch.int64)}, max_new_tokens=6)
    assert not torch.equal(causal, expected)


def in_chunks(model: SimVLM, chunks: list[Tensors]) -> torch.Tensor:
    """Logits of chunks run one after the other."""
    rows, length = len(chunks[0]["input_ids"]), sum(chunk["input_ids"].shape[1] for chunk in chunks)
    cache = KVCache(model, rows, length)
    with torch.no_grad():
        return torch.cat([model(**chunk, cache=cache) for chunk in chunks], 1)


def test_a_prefix_in_two_chunks_is_refused() -> None:
    model, ids, lengths = small(), torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([4])
    first, second = ({"input_ids": part, "prefix_lengths": lengths} for part in ids.split(3, dim=1))
    with pytest.raises(ValueError, match=r"prefix_lengths \[4\] do not fit rows of \[3\] tokens"):
        in_chunks(model, [first])
    with pytest.raises(ValueError, match=r"rows of \[6\] tokens, of which \[3\] were there before"):
        in_chunks(model, [{"input_ids": first["input_ids"]}, second])
    picture = torch.tensor([[IMAGE] * 4])
    with pytest.raises(ValueError, match="Pictures came after tokens that should see them whole"):
        in_chunks(model, [first | {"prefix_lengths": torch.tensor([0])}, {
            "input_ids": picture, "images": torch.zeros(1, 3, 16, 16),
        }])  # fmt: skip
    found = in_chunks(model, [{"input_ids": part, "prefix_lengths": lengths} for part in ids.split([4, 1, 1], dim=1)])
    torch.testing.assert_close(found, model(ids, prefix_lengths=lengths).detach(), atol=2e-5, rtol=0)


def test_a_row_may_begin_in_a_later_chunk() -> None:
    model, ids = small(), torch.tensor([[4, 5, 6, 7, 8, 9], [0, 0, 0, 7, 2, 3]])
    mask, lengths = torch.tensor([[1] * 6, [0] * 3 + [1] * 3]), torch.tensor([3, 2])
    parts = zip(ids.split(3, dim=1), mask.split(3, dim=1), (torch.tensor([3, 0]), lengths), strict=True)
    chunks = [{"input_ids": i, "attention_mask": m, "prefix_lengths": n} for i, m, n in parts]
    expected = model(ids, attention_mask=mask, prefix_lengths=lengths).detach()
    torch.testing.assert_close(in_chunks(model, chunks)[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=0)


def test_a_picture_in_a_later_chunk_knows_its_places() -> None:
    model, none = small(), torch.tensor([0])
    ids, images = torch.tensor([[4, 5, IMAGE, IMAGE, IMAGE, IMAGE, 8, 9]]), torch.randn(1, 3, 16, 16)
    chunks = [{"input_ids": part, "prefix_lengths": none} for part in ids.split([2, 5, 1], dim=1)]
    chunks[1]["images"] = images
    expected = model(ids, images=images, prefix_lengths=none).detach()
    torch.testing.assert_close(in_chunks(model, chunks), expected, atol=2e-5, rtol=0)


def test_lengths_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"prefix_lengths must be \[b\], one number a row; got shape \(1, 2\)"):
        small()(torch.ones(2, 3, dtype=torch.int64), prefix_lengths=torch.ones(1, 2, dtype=torch.int64))


def test_a_prefix_of_pictures_takes_no_lengths() -> None:
    model = tiny_model("llama")
    model.add_mixin("prefix", PrefixMaskMixin("images"))
    with pytest.raises(TypeError, match="no input 'prefix_lengths'"):
        model(torch.ones(1, 3, dtype=torch.int64), prefix_lengths=torch.tensor([2]))


def test_the_task_draws_prefixes_that_hold_the_picture_and_learns_what_is_behind() -> None:
    processor = load_processor(CONFIGS / "simvlm", tokenizer=CONFIGS / "shapes" / "tokenizer.model")
    task = TextTask(str(ROOT / "examples/zoo/shapes/train.jsonl"), pictures=True, random_prefix=True)
    task.prepare(from_yaml(SimVLM, "simvlm"), processor)
    batches, behind = task.batches(), set()
    for _ in range(6):
        batch = next(batches)
        assert batch["attention_mask"][:, 0].all()  # padded on the right
        for row, length in enumerate(batch["prefix_lengths"].tolist()):
            ids, labels = batch["input_ids"][row], batch["labels"][row]
            end = int(batch["attention_mask"][row].sum())
            assert bool((labels[:length] == -100).all()) and bool((labels[end:] == -100).all())
            assert torch.equal(labels[length:end], ids[length:end])
            assert int((ids == 5).nonzero().max()) < length < end
            behind.add(end - length)
    assert len(behind) > 4
    model = from_yaml(SimVLM, "simvlm")
    found = SimVLM.objective(model, batch)["language"]  # type: ignore[misc]
    other = {**batch, "labels": batch["labels"].clone()}
    other["labels"][batch["labels"] == -100] = batch["input_ids"][batch["labels"] == -100]
    assert not torch.equal(SimVLM.objective(model, other)["language"], found)  # type: ignore[misc]


def test_pictures_stay_causal_without_a_prefix_mask() -> None:
    model = small()
    ids, images = torch.tensor([[4, IMAGE, IMAGE, IMAGE, IMAGE, 8, 9]]), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected = model(ids, images=images, prefix_lengths=torch.tensor([0]))
        model.del_mixin("prefix")
        torch.testing.assert_close(model(ids, images=images), expected, atol=2e-5, rtol=0)


def test_text_is_counted_as_if_there_were_no_pictures() -> None:
    model = small()
    table = model.transformer.position_embeddings.weight
    ids = torch.tensor([[7, IMAGE, IMAGE, IMAGE, IMAGE, 3, 8]])
    with torch.no_grad():
        embeddings = model.run(ids, images=torch.zeros(1, 3, 16, 16), hidden_layers=("embeddings",)).hidden
        words = model.transformer.word_embeddings(ids)
        torch.testing.assert_close(embeddings["embeddings"][0, [0, 5, 6]], words[0, [0, 5, 6]] + table[:3])


@pytest.mark.parametrize("mixin", [ImagePositionsMixin(3), ImageRelativeBiasMixin(1)])
def test_pictures_of_another_number_of_tokens_are_refused(mixin: BaseMixin) -> None:
    model, batch = small(), rows()
    name = "positions" if isinstance(mixin, ImagePositionsMixin) else "relative"
    model.replace_mixin(name, mixin)
    with pytest.raises(ValueError, match="Pictures of mixin 'image' have 4 tokens each, not"):
        model(batch["input_ids"], images=batch["images"])


def half(ids: torch.Tensor) -> Tensors:
    """Half of a row is its prefix."""
    return {"prefix_lengths": torch.full((1,), ids.shape[1] // 2)}


CASES: list[tuple[str, str, Callable[[], BaseMixin]]] = [
    ("given", "prefix", lambda: PrefixMaskMixin("given")),
    ("images", "prefix", lambda: PrefixMaskMixin("images")),
    ("positions", "positions", lambda: ImagePositionsMixin(4)),
    ("relative", "relative", lambda: ImageRelativeBiasMixin(2)),
    ("resnet", "image", lambda: ImageMixin(tiny_config().vision, ProjectorConfig(), False, "none", IMAGE)),
]


@pytest.mark.parametrize(("name", "make_mixin"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_every_property_holds(name: str, make_mixin: Callable[[], BaseMixin]) -> None:
    report = check_mixin(make_mixin, small, replacing=name, extra_inputs=half)
    assert isinstance(report["cached equals uncached at every step and chunking"], float)
    assert isinstance(report["a padded batch equals its rows"], float)


def test_a_few_graphs_serve_all_batches() -> None:
    model, count, generator = small(), [0], torch.Generator().manual_seed(0)

    def backend(graph: Any, inputs: Any) -> Any:
        count[0] += 1
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for pictures in ((2, 2), (0, 1, 2), (1,), (3, 0, 1, 1, 0), (0, 0), (0,)):
        for num_tokens in (8, 11):
            batch = collate([sample_row(model, number, num_tokens, generator) for number in pictures])
            batch["prefix_lengths"] = batch["attention_mask"].sum(1) // 2
            given = {name: x for name, x in batch.items() if name in model.declared}
            with torch.no_grad():
                found = compiled(batch["input_ids"], plan=model.plan(**batch, dynamic=True), **given)
                torch.testing.assert_close(found, model(**batch), atol=2e-5, rtol=0)
    assert count[0] <= 6


@pytest.mark.parametrize("system", [git.SYSTEM, simvlm.SYSTEM], ids=lambda system: system.key)
@pytest.mark.parametrize("make", [lambda: PrefixTuningMixin(3), lambda: SlidingWindowMixin(5)], ids=["tuned", "window"])
def test_prefixes_and_biases_go_together_with_what_changes_keys_and_masks(
    make: Callable[[], BaseMixin], system: System
) -> None:
    check_mixin(make, system.build_tiny)
