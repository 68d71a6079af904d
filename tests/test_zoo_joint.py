"""VisualBERT, GIT and CM3 beyond their outputs: data, generation, foreign folders, and errors that help."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixformer import KVCache, from_pretrained, save_pretrained
from mixformer.config import make, read_settings
from mixformer.connectors import ProjectorConfig
from mixformer.data.causal_mask import CausalMaskTransform
from mixformer.generate import generate
from mixformer.mixins import (
    FrameEmbeddingMixin,
    ImageBesideMixin,
    ImageRegionsMixin,
    PrefixMaskMixin,
    SinusoidalPositionMixin,
)
from mixformer.testing import check_mixin, collate, jitter, tiny_model
from models.bert import BERT, BERTConfig
from models.clip import CLIPVisionConfig
from models.git import GIT, GITConfig, GITVisionConfig
from models.visual_bert import VisualBERT, VisualBERTConfig
from models.weights import HF_FORMATS
from tests.zoo import cm3, git, visual_bert
from tests.zoo.harness import CONFIGS, TOLERANCE, System, difference, jittered, reloaded

SENTINELS = tuple(range(1000, 1016))
SEEDS = range(200)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


class TestCausalMask:
    """The transform of CM3 (arXiv:2201.07520, section 2)."""

    def test_the_figure_of_the_paper(self) -> None:
        transform = CausalMaskTransform(SENTINELS)
        document = "Monte was a <a href=Armenian_nationalism> nationalist militant .".split()
        ids = {word: place for place, word in enumerate(document)}
        rotated = transform.rotate(list(range(len(document))), [(3, 5)])
        words = [{1000: "<mask:0>"}.get(token) or document[token] for token in rotated]
        expected = "Monte was a <mask:0> nationalist militant . <mask:0> <a href=Armenian_nationalism>"
        assert " ".join(words) == expected
        assert len(ids) == 8

    @pytest.mark.parametrize("end_id", [None, 999])
    def test_restoring_gives_the_document_back(self, end_id: int | None) -> None:
        transform = CausalMaskTransform(SENTINELS, end_id, rate=3.0)
        for seed in SEEDS:
            document = rng(seed).integers(0, 50, rng(seed + 1).integers(1, 60)).tolist()
            assert transform.restore(transform(document, rng(seed))) == document

    @pytest.mark.parametrize(("end_id", "grown"), [(None, 2), (999, 3)])
    def test_the_document_grows_by_the_marks_of_its_spans(self, end_id: int | None, grown: int) -> None:
        transform = CausalMaskTransform(SENTINELS, end_id, rate=4.0)
        for seed in SEEDS:
            document = list(range(70))
            rotated = transform(document, rng(seed))
            num_spans = len(set(rotated) & set(SENTINELS))
            assert len(rotated) == len(document) + grown * num_spans
            assert sorted(token for token in rotated if token < 900) == document

    def test_sentinels_stand_in_order_once_in_the_document_and_once_behind_it(self) -> None:
        transform = CausalMaskTransform(SENTINELS, rate=4.0)
        for seed in SEEDS:
            rotated = transform(list(range(70)), rng(seed))
            used = [token for token in rotated if token in SENTINELS]
            assert used == [*SENTINELS[: len(used) // 2]] * 2

    def test_spans_are_ordered_apart_and_not_empty(self) -> None:
        transform = CausalMaskTransform(SENTINELS, rate=6.0)
        for seed in SEEDS:
            spans = transform.draw(40, rng(seed))
            places = list(itertools.chain.from_iterable(spans))
            assert places == sorted(set(places))
            assert 0 <= places[0] and places[-1] <= 40

    def test_the_number_of_spans_is_a_poisson_draw_within_bounds(self) -> None:
        transform = CausalMaskTransform(SENTINELS[:3], rate=1.0, max_spans=3)
        counts = Counter(len(transform.draw(1000, rng(seed))) for seed in range(4000))
        zero, one, two = (np.exp(-1.0) / factorial for factorial in (1, 1, 2))
        expected = {1: zero + one, 2: two, 3: 1 - zero - one - two}
        assert set(counts) == set(expected)
        for number, probability in expected.items():
            assert abs(counts[number] / 4000 - probability) < 0.03

    def test_one_span_has_uniform_ends(self) -> None:
        transform = CausalMaskTransform(SENTINELS[:1], max_spans=1)
        spans = Counter(transform.draw(3, rng(seed))[0] for seed in range(3000))
        assert set(spans) == {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}
        assert all(abs(count / 3000 - 1 / 6) < 0.03 for count in spans.values())

    def test_a_seed_gives_the_same_document_and_another_seed_another_one(self) -> None:
        transform, document = CausalMaskTransform(SENTINELS), list(range(100))
        assert transform(document, rng(3)) == transform(document, rng(3))
        assert len({tuple(transform(document, rng(seed))) for seed in range(20)}) > 15

    def test_without_spans_nothing_changes(self) -> None:
        transform = CausalMaskTransform((), rate=0.0, min_spans=0, max_spans=0)
        assert transform([4, 5, 6], rng(0)) == [4, 5, 6]
        assert transform.restore([4, 5, 6]) == [4, 5, 6]
        assert transform([], rng(0)) == []

    def test_a_short_document_gets_as_many_spans_as_it_has_room_for(self) -> None:
        transform = CausalMaskTransform(SENTINELS, rate=50.0)
        assert transform.draw(1, rng(0)) == [(0, 1)]
        assert transform.draw(3, rng(0)) == [(0, 1), (2, 3)]

    def test_sentinels_are_not_learnt(self) -> None:
        transform = CausalMaskTransform(SENTINELS, end_id=999)
        rotated = transform.rotate([7, 8, 9], [(1, 2)])
        assert rotated == [7, 1000, 9, 1000, 8, 999]
        assert transform.labels(rotated) == [7, -100, 9, -100, 8, 999]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sentinel_ids": (1, 1), "max_spans": 2}, "must all differ"),
            ({"sentinel_ids": (1, 2), "end_id": 2, "max_spans": 2}, "must all differ"),
            ({"sentinel_ids": (1, 2)}, "cannot mark max_spans 16"),
            ({"sentinel_ids": (1, 2), "min_spans": 3, "max_spans": 2}, "min_spans 3"),
            ({"sentinel_ids": (1, 2), "rate": -1.0, "max_spans": 2}, "0 or above"),
        ],
    )
    def test_options_that_make_no_sense_are_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            CausalMaskTransform(**options)

    def test_documents_that_cannot_be_marked_are_refused(self) -> None:
        transform = CausalMaskTransform(SENTINELS, end_id=999, min_spans=2)
        with pytest.raises(ValueError, match="token 1003 at place 1"):
            transform([5, 1003, 6], rng(0))
        with pytest.raises(ValueError, match="token 999 at place 0"):
            transform([999, 5, 6], rng(0))
        with pytest.raises(ValueError, match="2 tokens is too short for 2 spans"):
            transform([5, 6], rng(0))

    @pytest.mark.parametrize("spans", [[(2, 2)], [(2, 1)], [(0, 2), (1, 3)], [(2, 3), (0, 1)], [(2, 9)]])
    def test_spans_that_overlap_or_lie_outside_are_refused(self, spans: list[tuple[int, int]]) -> None:
        with pytest.raises(ValueError, match="in order, without overlap"):
            CausalMaskTransform(SENTINELS).rotate([1, 2, 3, 4], spans)
        with pytest.raises(ValueError, match="need as many sentinel_ids"):
            CausalMaskTransform(SENTINELS[:1], max_spans=1).rotate([1, 2, 3, 4], [(0, 1), (2, 3)])

    @pytest.mark.parametrize("ids", [[1000, 4], [1000, 4, 1000, 5, 1000], [1001, 4, 1001, 5], [1001, 1000, 1001, 1000]])
    def test_what_was_cut_cannot_be_restored(self, ids: list[int]) -> None:
        with pytest.raises(ValueError, match="may have been cut"):
            CausalMaskTransform(SENTINELS).restore(ids)

    def test_a_span_without_its_end_cannot_be_restored(self) -> None:
        with pytest.raises(ValueError, match="does not end with end_id 999"):
            CausalMaskTransform(SENTINELS, end_id=999).restore([1000, 4, 1000, 5])


def greedy(reference: Any, ids: list[int], count: int, stops: set[int]) -> list[int]:
    """The likeliest tokens after a prompt by the reference, up to the first stop."""
    found: list[int] = []
    while len(found) < count:
        token = int(reference(torch.tensor([[*ids, *found]])).logits[0, -1].argmax())
        if token in stops:
            break
        found.append(token)
    return found


@pytest.mark.parametrize("end_id", [None, 40])
@torch.no_grad()
def test_holes_are_filled_with_what_the_reference_says_behind_their_sentinels(
    end_id: int | None, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )
    reference = jittered(LlamaForCausalLM(config), seed=3)
    transform = CausalMaskTransform((90, 91, 92), end_id, max_spans=3)
    before, between, after = [5, 9, 3], [11, 4], [7]
    stops = {90, 91, 92, 11} | ({end_id} if end_id else set())
    prompt = [*before, 90, *between, 91, *after, 90]
    first = greedy(reference, prompt, 6, stops)
    ends = [end_id] if end_id else []
    second = greedy(reference, [*prompt, *first, *ends, 91], 6, stops)
    assert 0 < len(first) < 6 and len(set(second)) > 1
    filled = transform.infill(reloaded(reference, tmp_path), [before, between, after], 6, stop_tokens=11)
    assert filled == [*before, *first, *between, *second, *after]


@torch.no_grad()
def test_a_hole_ends_at_the_next_sentinel() -> None:
    reference = cm3.tiny_xglm()  # says <mask:0> at once, as its head is tied
    transform = CausalMaskTransform((90, 91), max_spans=2)
    assert greedy(reference, [5, 9, 90, 7, 90], 1, set()) == [90]
    assert transform.infill(cm3.from_xglm(reference), [[5, 9], [7]], 6) == [5, 9, 7]


def test_a_document_without_a_hole_cannot_be_filled() -> None:
    transform = CausalMaskTransform((90, 91), max_spans=2)
    with pytest.raises(ValueError, match="1 pieces leave 0 holes"):
        transform.infill(None, [[1, 2]])
    with pytest.raises(ValueError, match="4 pieces leave 3 holes; there must be 1 to 2"):
        transform.infill(None, [[1], [2], [3], [4]])


@pytest.fixture(scope="module")
def git_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, GIT]:
    """HF's GIT, and ours with its weights."""
    reference = git.tiny_git()
    return reference, reloaded(reference, tmp_path_factory.mktemp("git"))


def picture_row(ids: list[int], images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Forward inputs of one row: pictures [m, 3, 16, 16], then text."""
    row = git.with_pictures(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64), len(images))
    del row["attention_mask"]
    return {**row, "images": images}


def pictures(count: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


class TestGIT:
    """GIT (arXiv:2205.14100)."""

    @pytest.fixture(autouse=True)
    def no_gradients(self) -> Any:
        with torch.no_grad():
            yield

    @pytest.mark.parametrize("cache", [True, False])
    def test_it_says_what_the_reference_says(self, git_pair: tuple[Any, GIT], cache: bool) -> None:
        reference, model = git_pair
        for seed, start in enumerate(([5], [5, 33, 71])):
            images = pictures(1, seed)
            ids = torch.tensor([start])
            expected = reference.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=images, max_new_tokens=9,
                do_sample=False, eos_token_id=None,
            )[:, len(start) :]
            row = picture_row(start, images)
            assert len(set(expected[0].tolist())) > 2
            assert torch.equal(generate(model, row, 9, cache=cache), expected)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_a_padded_batch_equals_its_rows(self, git_pair: tuple[Any, GIT], side: str) -> None:
        model = git_pair[1]
        rows = [
            picture_row([5, 12, 40, 7, 9], pictures(1)), picture_row([5, 8], pictures(2, 4)),
            {"input_ids": torch.tensor([[5, 9, 9]])},
        ]
        batch = collate(rows, side)
        found = model(**batch)
        for index, row in enumerate(rows):
            real = batch["attention_mask"][index].bool()
            assert difference(found[index][real], model(**row)[0]) < TOLERANCE

    @pytest.mark.parametrize("chunks", [[17, 7], [18, 1, 5], [19, 4, 1], [24]])
    def test_text_in_chunks_equals_text_at_once(self, git_pair: tuple[Any, GIT], chunks: list[int]) -> None:
        model = git_pair[1]
        row = picture_row([5, 12, 40, 7, 9, 33, 60], pictures(1))
        cache, found, start = KVCache(model, 1, 24), [], 0
        for size in chunks:
            part = {"input_ids": row["input_ids"][:, start : start + size]}
            if start == 0:
                part |= {"token_type_ids": row["token_type_ids"][:, :size], "images": row["images"]}
            found.append(model(**part, cache=cache))
            start += size
        assert difference(torch.cat(found, 1), model(**row)) < TOLERANCE

    def test_texts_behind_one_picture_share_it(self, git_pair: tuple[Any, GIT]) -> None:
        model, image = git_pair[1], pictures(1)
        rows = [picture_row(ids, image) for ids in ([5, 12, 40, 7], [9, 33])]
        found = generate(model, collate(rows), 5, share_prefix=True)
        for index, row in enumerate(rows):
            assert found[index].tolist() == generate(model, row, 5, cache=False)[0].tolist()

    def test_pictures_see_pictures_alone_and_text_sees_what_comes_before(self, git_pair: tuple[Any, GIT]) -> None:
        model = git_pair[1]
        images, text = pictures(2), [5, 12, 40, 7]
        plain = model(**picture_row(text, images))[0]
        other_text = model(**picture_row([5, 12, 41, 7], images))[0]
        changed = (plain - other_text).abs().amax(-1) > 0
        assert changed.tolist() == [False] * 36 + [True] * 2
        other_last = model(**picture_row(text, torch.stack([images[0], images[1] + 1])))[0]
        assert ((plain - other_last).abs().amax(-1) > 0).all()

    def test_text_positions_begin_at_zero_behind_any_number_of_pictures(self, git_pair: tuple[Any, GIT]) -> None:
        model = git_pair[1]
        for row in (picture_row([5, 12, 40], pictures(1)), picture_row([5, 12, 40], pictures(2))):
            assert model.plan(**row).position_ids[0, -3:].tolist() == [0, 1, 2]

    @pytest.mark.parametrize("num_frames", [None, 2])
    def test_what_it_writes_is_read_by_transformers(self, tmp_path: Path, num_frames: int | None) -> None:
        from transformers import GitForCausalLM

        vision = GITVisionConfig(
            hidden_size=16, num_layers=2, num_heads=2, inner_hidden_size=24, image_size=16, patch_size=4,
            norm_eps=1e-4, num_frames=num_frames,
        )
        adapter = ProjectorConfig(norm="post", norm_eps=1e-4)
        config = GITConfig(
            vocab_size=97, hidden_size=24, num_layers=2, num_heads=4, inner_hidden_size=40, max_positions=30,
            activation="relu", vision=vision, adapter=adapter,
        )
        model = config.build(generator=torch.Generator().manual_seed(2)).eval()
        save_pretrained(model, tmp_path / "hf", format="hf")
        theirs = GitForCausalLM.from_pretrained(tmp_path / "hf").eval()
        count = num_frames or 1
        ids, mask, images = git.sample(count)
        batch = {**git.with_pictures(ids, mask, count), "images": images.flatten(0, 1)}
        if num_frames:
            batch["frame_ids"] = torch.arange(count).repeat(2)
        real = batch["attention_mask"].bool()
        expected = theirs(ids, mask, pixel_values=images if num_frames else images[:, 0]).logits
        assert difference(model(**batch)[real], expected[real]) < TOLERANCE
        again = from_pretrained(tmp_path / "hf")
        assert torch.equal(again(**batch), model(**batch))

    def test_a_folder_of_the_reference_is_written_back(self, git_pair: tuple[Any, GIT], tmp_path: Path) -> None:
        from transformers import GitForCausalLM

        reference, model = git_pair
        save_pretrained(model, tmp_path / "hf", format="hf")
        theirs = GitForCausalLM.from_pretrained(tmp_path / "hf")
        for name, tensor in reference.state_dict().items():
            assert torch.equal(theirs.state_dict()[name], tensor), name

    def test_frames_that_do_not_fit_are_refused(self) -> None:
        vision = GITVisionConfig(
            hidden_size=16, num_layers=1, num_heads=2, inner_hidden_size=24, image_size=16, patch_size=4, num_frames=2
        )
        config = GITConfig(vocab_size=97, hidden_size=24, num_layers=1, num_heads=4, max_positions=30, vision=vision)
        model, row = config.build(), picture_row([5, 6], pictures(2))
        with pytest.raises(ValueError, match="one for each of the 2 images"):
            model(**row, frame_ids=torch.tensor([0]))
        with pytest.raises(ValueError, match="from 0 to 1"):
            model(**row, frame_ids=torch.tensor([0, 2]))

    def test_a_tied_head_is_refused(self, git_pair: tuple[Any, GIT], tmp_path: Path) -> None:
        git_pair[0].save_pretrained(tmp_path)
        content = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**content, "tie_word_embeddings": True}))
        with pytest.raises(ValueError, match="tied"):
            from_pretrained(tmp_path)


BERT_SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "inner_hidden_size": 40, "max_positions": 30,
}


def tiny_visual_bert(**options: Any) -> VisualBERT:
    """A small model with noise on every parameter."""
    config = VisualBERTConfig(**{**BERT_SIZES, "feature_size": 12, "image_token_id": 3, **options})
    model = VisualBERT(config, generator=torch.Generator().manual_seed(0)).eval()
    jitter(model)
    return model


def features(count: int, num_regions: int) -> torch.Tensor:
    return torch.randn(count, num_regions, 12, generator=torch.Generator().manual_seed(7))


class TestVisualBERT:
    """VisualBERT (arXiv:1908.03557)."""

    @pytest.fixture(autouse=True)
    def no_gradients(self) -> Any:
        with torch.no_grad():
            yield

    def test_the_tables_of_regions_begin_as_copies_of_the_texts(self) -> None:
        model = VisualBERT(VisualBERTConfig(**BERT_SIZES))
        regions = model.get_mixin("regions")
        assert torch.equal(regions.position_table, model.transformer.position_embeddings.weight)
        assert torch.equal(regions.token_type_table, model.get_mixin("segments").table)
        regions.position_table.add_(1.0)
        assert not torch.equal(regions.position_table, model.transformer.position_embeddings.weight)

    def test_text_alone_gives_what_bert_gives(self) -> None:
        model = tiny_visual_bert()
        bert = BERT(BERTConfig(**BERT_SIZES)).eval()
        weights = {name: tensor for name, tensor in model.state_dict().items() if ".regions." not in name}
        bert.load_state_dict(weights, strict=True)
        inputs = {"input_ids": torch.tensor([[5, 9, 40, 7]]), "segment_ids": torch.tensor([[0, 0, 1, 1]])}
        assert torch.equal(model(**inputs), bert(**inputs))

    def test_filled_up_regions_equal_rows_of_their_own(self) -> None:
        model, images = tiny_visual_bert(), features(2, 5)
        ids = torch.tensor([[5, 9, 40, 7, 3, 3, 3, 3, 3], [5, 8, 0, 0, 3, 3, 3, 3, 3]])
        mask = torch.tensor([[1] * 9, [1, 1, 0, 0, 1, 1, 1, 0, 0]])
        found = model.run(ids, mask, images=images)
        for other in (images, images.index_fill(1, torch.tensor([3, 4]), 9.0)[1:].repeat(2, 1, 1)):
            changed = torch.cat([images[:1], other[1:]])
            assert torch.equal(model(ids, mask, images=changed)[1, mask[1].bool()], found.logits[1, mask[1].bool()])
        alone = model.run(torch.tensor([[5, 8, 3, 3, 3]]), images=images[1:, :3])
        assert difference(found.logits[1, mask[1].bool()], alone.logits[0]) < TOLERANCE
        assert difference(found.outputs["sentence"][1], alone.outputs["sentence"][0]) < TOLERANCE

    def test_places_are_told_by_the_placeholder_or_by_token_types(self) -> None:
        model, images = tiny_visual_bert(), features(1, 2)
        told = model(torch.tensor([[5, 9, 3, 3]]), images=images)
        types = torch.tensor([[0, 0, 1, 1]])
        assert torch.equal(model(torch.tensor([[5, 9, 3, 3]]), token_type_ids=types, images=images), told)
        assert torch.equal(model(torch.tensor([[5, 9, 8, 0]]), token_type_ids=types, images=images), told)

    def test_text_is_counted_as_if_there_were_no_regions(self) -> None:
        plan = tiny_visual_bert().plan(torch.tensor([[5, 9, 3, 3, 40, 7]]), images=features(1, 2))
        assert plan.position_ids[0, [0, 1, 4, 5]].tolist() == [0, 1, 2, 3]

    def test_patches_of_a_tower_are_regions_like_any_others(self) -> None:
        vision = CLIPVisionConfig(
            hidden_size=12, num_layers=1, num_heads=2, inner_hidden_size=20, image_size=8, patch_size=4
        )
        model, ready = tiny_visual_bert(vision=vision), tiny_visual_bert()
        weights = {name: tensor for name, tensor in model.state_dict().items() if ".tower." not in name}
        ready.load_state_dict(weights, strict=True)
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        ids = torch.tensor([[5, 9, 3, 3, 3, 3], [6, 40, 3, 3, 3, 3]])
        tower = model.get_mixin("regions").tower
        assert torch.equal(model(ids, images=images), ready(ids, images=tower(images=images)))

    def test_what_it_writes_is_read_by_transformers(self, tmp_path: Path) -> None:
        from transformers import VisualBertForPreTraining

        model = tiny_visual_bert(
            vocab_size=97, feature_size=visual_bert.FEATURE_SIZE, activation="relu", norm_eps=1e-4,
            image_token_id=visual_bert.PLACEHOLDER,
        )
        save_pretrained(model, tmp_path / "hf", format="hf")
        theirs = VisualBertForPreTraining.from_pretrained(tmp_path / "hf").eval()
        batch = visual_bert.sample()
        expected, ours = theirs(**batch), visual_bert.as_ours(batch)
        real = ours["attention_mask"].bool()
        found = model.run(**ours)
        assert difference(found.logits[real], expected.prediction_logits[real]) < TOLERANCE
        assert difference(found.outputs["sentence"], expected.seq_relationship_logits) < TOLERANCE
        again = from_pretrained(tmp_path / "hf")
        assert torch.equal(again(**ours), model(**ours))

    def test_a_folder_of_the_reference_is_written_back(self, tmp_path: Path) -> None:
        from transformers import VisualBertForPreTraining

        reference = visual_bert.tiny_visual_bert()
        save_pretrained(reloaded(reference, tmp_path / "theirs"), tmp_path / "back", format="hf")
        theirs = VisualBertForPreTraining.from_pretrained(tmp_path / "back")
        for name, tensor in reference.state_dict().items():
            assert torch.equal(theirs.state_dict()[name], tensor), name

    def test_a_transformer_that_regions_bypass_is_refused(self, tmp_path: Path) -> None:
        visual_bert.tiny_visual_bert().save_pretrained(tmp_path)
        content = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**content, "bypass_transformer": True}))
        with pytest.raises(ValueError, match="bypass the transformer"):
            from_pretrained(tmp_path)

    def test_words_of_regions_must_fit(self) -> None:
        model, images, ids = tiny_visual_bert(), features(1, 2), torch.tensor([[5, 9, 3, 3]])
        with pytest.raises(ValueError, match="a list of words for every region"):
            model(ids, images=images, image_text_alignment=torch.zeros(1, 3, 1, dtype=torch.int64))
        with pytest.raises(ValueError, match="names position 30; the text has positions up to 29"):
            model(ids, images=images, image_text_alignment=torch.full((1, 2, 1), 30))

    def test_regions_need_tables_to_begin_with(self) -> None:
        model = BERT(BERTConfig(**BERT_SIZES))
        with pytest.raises(ValueError, match="two kinds of tokens in a mixin 'kinds'"):
            model.add_mixin("regions", ImageRegionsMixin(None, feature_size=12, token_types="kinds"))
        with pytest.raises(ValueError, match="positions 'learned'"):
            tiny_model("llama").add_mixin("regions", ImageRegionsMixin(None, feature_size=12))


def tiny_vision() -> GITVisionConfig:
    return GITVisionConfig(
        hidden_size=16, num_layers=1, num_heads=2, inner_hidden_size=24, image_size=16, patch_size=8
    )


def tiny_git_model() -> GIT:
    config = GITConfig(
        vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, max_positions=64, vision=tiny_vision()
    )
    return GIT(config, generator=torch.Generator().manual_seed(0))


GIT_LARGE = {  # config.json of microsoft/git-large-coco
    "architectures": ["GitForCausalLM"], "attention_probs_dropout_prob": 0.1, "bos_token_id": 101,
    "classifier_dropout": None, "eos_token_id": 102, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
    "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12,
    "max_position_embeddings": 1024, "model_type": "git", "num_attention_heads": 12, "num_hidden_layers": 6,
    "num_image_with_embedding": None, "pad_token_id": 0, "position_embedding_type": "absolute",
    "tie_word_embeddings": False, "use_cache": True, "vocab_size": 30522,
    "vision_config": {
        "dropout": 0.0, "hidden_size": 1024, "initializer_factor": 1.0, "intermediate_size": 4096,
        "model_type": "git_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14,
        "projection_dim": 512,
    },
}
VISUAL_BERT_NLVR2 = {  # config.json of uclanlp/visualbert-nlvr2-coco-pre
    "architectures": ["VisualBertForPreTraining"], "attention_probs_dropout_prob": 0.1, "bos_token_id": 0,
    "bypass_transformer": False, "eos_token_id": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
    "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512, "model_type": "visual_bert", "num_attention_heads": 12, "num_hidden_layers": 12,
    "pad_token_id": 1, "special_visual_initialize": True, "type_vocab_size": 2, "visual_embedding_dim": 1024,
    "vocab_size": 30522,
}


@pytest.mark.parametrize(
    ("content", "system", "file"),
    [
        (GIT_LARGE, git.SYSTEM, "large.yaml"), (VISUAL_BERT_NLVR2, visual_bert.SYSTEM, "nlvr2.yaml"),
        ({"model_type": "git", "vision_config": {}}, git.SYSTEM, None),
    ],
)
def test_a_released_configuration_is_the_published_size(
    content: dict[str, Any], system: System, file: str | None
) -> None:
    found = next(each for each in HF_FORMATS if each.claims(content))
    names = {"cls.seq_relationship.weight": (2, 768)}
    read = make(system.model_class.Config, found.read_config(content, names), "config")
    released = read.build(device="meta").state_dict()
    path = None if file is None else CONFIGS / system.key / file
    ours = read_settings(system.model_class, path).build_model("meta").state_dict()
    assert {name: tensor.shape for name, tensor in released.items()} == {n: t.shape for n, t in ours.items()}
    options = {name: getattr(read, name) for name in ("norm_eps", "activation", "norm_order", "causal")}
    assert options == {
        "norm_eps": 1e-12, "activation": "gelu", "norm_order": "post", "causal": system is git.SYSTEM,
    }


def test_every_property_holds_for_the_places_of_frames() -> None:
    vision = dataclasses.replace(tiny_vision(), patch_size=4)
    check_mixin(
        lambda: FrameEmbeddingMixin(3), lambda: vision.build(),
        extra_inputs=lambda images: {"frame_ids": torch.full(images.shape[:1], int(images.sum() > 0))},
    )


def test_frames_run_in_one_compiled_graph() -> None:
    vision = dataclasses.replace(tiny_vision(), num_frames=2, patch_size=4)
    config = GITConfig(vocab_size=97, hidden_size=24, num_layers=1, num_heads=4, max_positions=30, vision=vision)
    model, row = config.build(), {**picture_row([5, 6], pictures(2)), "frame_ids": torch.tensor([0, 1])}
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = {name: row[name] for name in ("images", "frame_ids")}
    with torch.no_grad():
        assert difference(compiled(plan=model.plan(**row), **inputs), model(**row)) < TOLERANCE


class TestMixins:
    """Properties of every composition."""

    def test_sinusoidal_positions(self) -> None:
        check_mixin(SinusoidalPositionMixin, tiny_model("llama"))

    def test_pictures_beside_the_text(self) -> None:
        adapter = ProjectorConfig(norm="post")
        check_mixin(lambda: ImageBesideMixin(tiny_vision(), adapter), tiny_model("llama"))
        check_mixin(lambda: ImageBesideMixin(tiny_vision(), adapter), tiny_git_model(), replacing="image")

    def test_regions(self) -> None:
        def bert() -> BERT:
            return BERT(BERTConfig(**{**BERT_SIZES, "max_positions": 64}, next_sentence=False))

        check_mixin(lambda: ImageRegionsMixin(tiny_vision(), ProjectorConfig()), bert)

    def test_a_prefix_of_pictures(self) -> None:
        check_mixin(PrefixMaskMixin, tiny_git_model(), replacing="prefix")
        check_mixin(PrefixMaskMixin, tiny_model("cogvlm"))

    def test_sine_and_cosine_positions_follow_the_model_into_lower_precision(self) -> None:
        model = cm3.CM3(cm3.CM3Config(vocab_size=31, hidden_size=16, num_layers=1, num_heads=2)).bfloat16()
        assert model(torch.tensor([[3, 4, 5]])).dtype == torch.bfloat16

    def test_sine_and_cosine_positions_need_an_even_width(self) -> None:
        with pytest.raises(ValueError, match="even hidden size"):
            cm3.CM3(cm3.CM3Config(vocab_size=31, hidden_size=15, num_layers=1, num_heads=3))
