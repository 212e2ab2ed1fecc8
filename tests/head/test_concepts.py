"""Concept embeddings: their start, what is called, and what has a gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.task.tiny import tiny_tokenizer
from tunewise.core.errors import UserError
from tunewise.core.handle import attach, restore
from tunewise.core.recipe import Recipe
from tunewise.head.concepts import ConceptHead

TASK: Any = SimpleNamespace(name="classification", labels=["good film", "bad film"])


def base() -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    options = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertModel(BertConfig(vocab_size=40, hidden_size=16, **options), add_pooling_layer=False).eval()


def ready(pooling: str = "mean", tokenizer: Any = None, **options: Any) -> tuple[Any, Any, ConceptHead]:
    model, head = base(), ConceptHead(pooling=pooling, **options)  # type: ignore[arg-type]
    head.setup(TASK, tokenizer, model)
    return model, attach(model, Recipe(head=head), seed=0), head


def read(handle: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    t = next(t for _, _, t in handle.sites if t.part.slot == "head")
    batch = SimpleNamespace(inputs=inputs, ids=["0"])
    found: torch.Tensor = t.part.logits(t.cast(torch.float32), handle.model(**inputs), batch)
    return found


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_a_name_is_nearest_to_its_own_class(pooling: str) -> None:
    tokenizer = tiny_tokenizer(bert=True)
    _, handle, _ = ready(pooling, tokenizer)
    for c, name in enumerate(TASK.labels):
        ids = torch.tensor([tokenizer(name)["input_ids"]])
        logits = read(handle, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        assert logits.argmax() == c and abs(float(logits[0, c]) - 1 / 0.07) < 1e-3


def test_template_and_the_models_own_call() -> None:
    tokenizer = tiny_tokenizer(bert=True)
    model, handle, _ = ready("mean", tokenizer, template="a {label} hi")
    ids = torch.tensor([tokenizer("a good film hi")["input_ids"]])
    wanted = model(input_ids=ids).last_hidden_state.mean(1)[0]
    torch.testing.assert_close(handle.sites[0][2].E[0], wanted.detach())
    with pytest.raises(UserError, match="label"):
        ready("mean", tokenizer, template="a film")


def test_names_are_encoded_once_and_only_embeddings_learn() -> None:
    tokenizer = tiny_tokenizer(bert=True)
    model, handle, _ = ready("mean", tokenizer)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.randint(7, 25, (3, 5))
    logits = read(handle, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    F.cross_entropy(logits, torch.tensor([0, 1, 0])).backward()
    assert len(calls) == 1 and handle.trainable == 2 * 16
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["tw_default_concept_head.E"]


def test_saved_concepts_come_back(tmp_path: Any) -> None:
    _, handle, _ = ready("mean", tiny_tokenizer(bert=True))
    handle.save(tmp_path)
    again = restore(base(), tmp_path)
    assert torch.equal(again.sites[0][2].E, handle.sites[0][2].E)


def test_without_a_tokenizer_noise_and_without_classes_a_refusal() -> None:
    _, handle, _ = ready()
    assert handle.sites[0][2].E.std() > 0.5
    with pytest.raises(UserError, match="has none"):
        ConceptHead().setup(SimpleNamespace(name="regression", labels=None), None, base())
