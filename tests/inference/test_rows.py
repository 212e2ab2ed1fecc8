"""Every row of a batch through an adaptation of its own: equal to separate runs, and nothing is ignored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import tunewise as tw
from tests.core.toy_deltas import Dense, Started
from tests.models import tiny, tiny_batch
from tunewise.core.delta import Delta, P
from tunewise.core.forward import forward_of
from tunewise.sites import Site

NAMES = ["a", "b", None, "a"]
ALONE = ["a", None, None, "a"]


class Wider(Dense):
    """x' = x + D x: the input changes before the product."""

    sites: str | list[str] = "query"
    weight = Delta.weight
    kinds: ClassVar[tuple[str, ...]] = ("linear",)

    def tensors(self, site: Site) -> dict[str, P]:
        return {"D": P(torch.zeros(site.in_features or 0, site.in_features or 0))}

    def input(self, t: Any, x: Tensor) -> Tensor:
        return x + x @ t.D


def moved(model: nn.Module, method: Any, name: str, seed: int) -> tw.Handle:
    handle = tw.attach(model, method, seed=seed, name=name)
    make = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn(p.shape, generator=make) * 0.1)
    return handle


def batch_of(name: str, size: int = 4) -> dict[str, Tensor]:
    """Rows of different lengths, padded: on the right for encoders, on the left for decoders."""
    batch = tiny_batch(name, size=size, length=7)
    batch.pop("labels", None)
    for row in range(size if "attention_mask" in batch else 0):
        short = row % 3
        left = name in ("llama", "gpt2", "mixtral")
        hidden = slice(0, short) if left else slice(7 - short, 7)
        batch["attention_mask"][row, hidden] = 0
        batch["input_ids"][row, hidden] = 0
    if name in ("t5", "bart"):
        batch["decoder_input_ids"] = batch["input_ids"].flip(1)[:, :5]
    return batch


@torch.no_grad()
def answer(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits  # type: ignore[no-any-return]


@torch.no_grad()
def apart(model: Any, batch: dict[str, Tensor], names: Sequence[str | None]) -> Tensor:
    """Each row in a run of its own."""
    found = []
    for i, name in enumerate(names):
        for handle in tw.handles(model).values():
            handle.deactivate()
        if name is not None:
            tw.handles(model)[name].activate()
        found.append(model(**{k: v[i : i + 1] for k, v in batch.items()}).logits)
    return torch.cat(found)


CASES = [
    ("bert", "lora(rank=2)", "lora(rank=4, sites='query | value')"),
    ("bert", "lora(rank=2)", "series_adapter"),
    ("bert", "lora(rank=2, sites='linear & ~head') + ClassHead()", "parallel_adapter + ClassHead()"),
    ("bert", "ladder", "lora(rank=2)"),
    ("bert", "bias_scale", Dense("query | output")),
    ("llama", "lora(rank=2)", "lora(rank=2, sites='linear | embedding')"),
    ("llama", "lora(rank=2)", Dense("query | output")),
    ("llama", "full", "series_adapter(sites='attention | mlp')"),
    ("llama", Wider(), "ladder"),
    ("gpt2", "lora(rank=2, sites='query | down')", "lora(rank=2)"),
    ("t5", "lora(rank=2)", "parallel_adapter"),
    ("bart", "lora(rank=2)", Dense("query | output")),
    ("deberta", "lora(rank=2, sites='value | output')", Dense("value")),
    ("vit", "lora(rank=2)", "series_adapter"),
]


def recipe(method: Any) -> Any:
    from tunewise.head import ClassHead

    if isinstance(method, str) and method.endswith(" + ClassHead()"):
        from tunewise.core.method import read_recipe

        return read_recipe(method.removesuffix(" + ClassHead()")) + ClassHead()
    return method


@pytest.mark.parametrize(("name", "first", "second"), CASES, ids=str)
def test_rows_equal_separate_runs(name: str, first: Any, second: Any) -> None:
    model = tiny(name)
    a, b = moved(model, recipe(first), "a", 1), moved(model, recipe(second), "b", 2)
    batch = batch_of(name)
    wanted = apart(model, batch, NAMES)
    for other in (["a"] * 4, ["b", "b", "a", None]):  # the rows do differ by who answers them
        assert (apart(model, batch, other) - wanted).abs().amax(
            dim=tuple(range(1, wanted.dim()))
        ).max() > 1e-3
    b.activate()
    before = answer(model, batch)
    with tw.rows(model, NAMES):
        torch.testing.assert_close(answer(model, batch), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(answer(model, batch), before) and b.active and not a.active
    for one in ("a", None):
        with tw.rows(model, [one] * 4):
            found = answer(model, batch)
        torch.testing.assert_close(found, apart(model, batch, [one] * 4), rtol=1e-5, atol=1e-5)
    a.detach()
    b.detach()
    assert all(forward_of(m) is None for m in model.modules())


def test_the_base_product_of_low_rank_rows_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.nn.functional as F

    model = tiny("llama")
    a = moved(model, "lora(rank=2, sites='query')", "a", 1)
    moved(model, "lora(rank=2, sites='query')", "b", 2)
    whole = {id(s.module.weight) for _, s, _ in a.sites}
    shapes: list[int] = []
    linear = F.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if id(weight) in whole:
            shapes.append(len(x))
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", counted)
    with tw.rows(model, NAMES):
        answer(model, batch_of("llama"))
    assert shapes == [4, 4]


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}], ids=str
)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generate_answers_each_row_with_its_adaptation(name: str, options: dict[str, Any]) -> None:
    model: Any = tiny(name)
    moved(model, "lora(rank=2, sites='linear')", "a", 1)
    moved(model, Dense("query | output"), "b", 2)
    batch = batch_of(name)
    batch.pop("decoder_input_ids", None)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **options}
    each = options.get("num_return_sequences", 1)
    wanted = []
    for i, one in enumerate(NAMES):
        for handle in tw.handles(model).values():
            handle.deactivate()
        if one is not None:
            tw.handles(model)[one].activate()
        wanted.append(model.generate(**{k: v[i : i + 1] for k, v in batch.items()}, **settings))
    with tw.rows(model, NAMES):
        found = model.generate(**batch, **settings)
        assert "generate" in model.__dict__
    assert "generate" not in model.__dict__
    assert torch.equal(found, torch.cat(wanted)) and len(found) == 4 * each
    assert not all(torch.equal(w, wanted[0]) for w in wanted)


def test_each_row_trains_its_own_adaptation() -> None:
    model, batch = tiny("llama"), batch_of("llama")
    handles = {n: moved(model, "lora(rank=2)", n, s) for n, s in (("a", 1), ("b", 2))}

    def gradients(name: str) -> list[Tensor]:
        found = []
        for p in handles[name].parameters():
            assert p.grad is not None
            found.append(p.grad)
            p.grad = None
        return found

    with tw.rows(model, NAMES):
        model(**batch).logits.square().sum().backward()
    together = {n: gradients(n) for n in "ab"}
    for name, picked in (("a", [0, 3]), ("b", [1])):
        handles[name].activate()
        model(**{k: v[picked] for k, v in batch.items()}).logits.square().sum().backward()
        for found, wanted in zip(together[name], gradients(name), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_a_mix_comes_back_and_does_not_count_inside() -> None:
    model, batch = tiny("llama"), batch_of("llama")
    for i, name in enumerate("ab"):
        moved(model, "lora(rank=2)", name, i)
    wanted = apart(model, batch, NAMES)
    tw.mix(model, {"a": 0.5, "b": 0.25})
    mixed = answer(model, batch)
    with tw.rows(model, NAMES):
        torch.testing.assert_close(answer(model, batch), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(answer(model, batch), mixed)


def test_an_error_inside_leaves_everything_as_it_was() -> None:
    model, batch = tiny("llama"), batch_of("llama")
    handle = moved(model, "lora(rank=2)", "a", 1)
    before = answer(model, batch)
    with pytest.raises(ZeroDivisionError), tw.rows(model, NAMES[2:]):
        raise ZeroDivisionError
    assert torch.equal(answer(model, batch), before) and handle.active
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_plans_do_not_pile_up() -> None:
    model, batch = tiny("llama"), batch_of("llama")
    handle = moved(model, "lora(rank=2)", "a", 1)
    for _ in range(5):
        with tw.rows(model, [None, "a", None, "a"]):
            answer(model, batch)
    forward = forward_of(handle.sites[0][1].module)
    assert forward is not None and len(forward.plans) <= 2


@pytest.mark.parametrize("size", [1, 3, 8])
def test_another_number_of_rows_is_refused(size: int) -> None:
    model: Any = tiny("llama")
    moved(model, "lora(rank=2)", "a", 1)
    with tw.rows(model, ["a", None]):
        with pytest.raises(tw.UserError, match=f"2 names and the batch has {size} rows"):
            answer(model, batch_of("llama", size))
        with pytest.raises(tw.UserError, match=f"2 names and the batch has {size} rows"):
            model.generate(**batch_of("llama", size), max_new_tokens=1)
        with pytest.raises(tw.UserError, match=f"2 names and the batch has {size} rows"):
            model.generate(batch_of("llama", size)["input_ids"], max_new_tokens=1)


def test_names_are_checked() -> None:
    model = tiny("llama")
    moved(model, "lora(rank=2)", "poems", 1)
    with pytest.raises(tw.UserError, match='no adaptation called "poem".*poems'), tw.rows(model, ["poem"]):
        pass
    with pytest.raises(tw.UserError, match="one name"), tw.rows(model, []):
        pass


@pytest.mark.parametrize(
    ("name", "method", "words"),
    [
        ("llama", "prompt_tuning(tokens=2)", "SoftPrompt adds positions to all rows"),
        ("llama", "prefix_tuning(tokens=2)", "Prefix adds positions to all rows"),
        ("llama", Started("query | output"), "its start changed .*q_proj.weight of the base"),
        ("mixtral", "lora(rank=2, sites='experts')", "sees tokens that a router has sorted"),
        ("t5", "lora(rank=2, sites='embedding')", "looks up positions, not rows"),
        ("gpt2", "full", "it trains transformer.wpe.weight, which belongs to no layer"),
        ("vit", "full", "it trains .*(token|position).*, which belongs to no layer"),
    ],
    ids=str,
)
def test_what_acts_on_no_row_alone_is_refused(name: str, method: Any, words: str) -> None:
    model = tiny(name)
    moved(model, method, "a", 1)
    before = answer(model, batch_of(name))
    with (
        pytest.raises(tw.UserError, match=f'"a" cannot have rows of a batch: .*{words}'),
        tw.rows(model, ALONE),
    ):
        pass
    assert torch.equal(answer(model, batch_of(name)), before)


def test_layers_that_do_not_see_rows_are_refused_in_words() -> None:
    model = tiny("deberta")  # its query projects the table of relative positions too, once for all rows
    moved(model, "lora(rank=2, sites='query')", "a", 1)
    with (
        tw.rows(model, ALONE),
        pytest.raises(tw.UserError, match="query_proj is called with a first axis of 1"),
    ):
        answer(model, batch_of("deberta"))


def test_parts_of_the_model_do_not_know_the_rows() -> None:
    model: Any = tiny("llama")
    moved(model, "lora(rank=2)", "a", 1)
    with tw.rows(model, ALONE), pytest.raises(tw.UserError, match="call the model itself"):
        model.model(**batch_of("llama"))


class Reader(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) @ self.second.weight.T  # type: ignore[no-any-return]


def test_a_trained_weight_that_is_read_past_its_layer_is_no_silence() -> None:
    model, x = Reader(), torch.randn(2, 4)
    moved(model, "partial(sites='second', which='weight')", "a", 1)
    with tw.rows(model, ["a", None]), pytest.raises(tw.UserError, match='second.weight of "a" is trained'):
        model(x)


class SequenceFirst(nn.Module):
    """Its layer sees [positions, rows, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x.transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]


def test_a_first_axis_that_is_a_multiple_of_the_rows_is_still_no_row() -> None:
    model = SequenceFirst()
    moved(model, "lora(rank=2)", "a", 1)
    with tw.rows(model, ["a", None]), pytest.raises(tw.UserError, match="a first axis of 4 for a batch of 2"):
        model(torch.randn(2, 4, 4))


@pytest.mark.parametrize("what", ["attach", "activate", "deactivate", "detach", "mix", "merge"])
def test_nothing_is_switched_inside(what: str) -> None:
    model, batch = tiny("llama"), batch_of("llama")
    handle = moved(model, "lora(rank=2)", "a", 1)
    wanted = apart(model, batch, ["a", None, None, None])
    actions: dict[str, Any] = {
        "attach": lambda: tw.attach(model, "lora(rank=2)", name="b"),
        "mix": lambda: tw.mix(model, {"a": 0.5}),
    }
    with tw.rows(model, ["a", None, None, None]):
        with pytest.raises(tw.UserError, match="Inside tw.rows"):
            actions.get(what, getattr(handle, what, None))()
        torch.testing.assert_close(answer(model, batch), wanted, rtol=1e-5, atol=1e-5)
    assert list(tw.handles(model)) == ["a"]
    with tw.rows(model, ["a"]), pytest.raises(tw.UserError, match="Inside tw.rows"), tw.rows(model, ["a"]):
        pass
