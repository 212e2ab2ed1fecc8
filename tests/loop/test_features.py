"""Trials that share frozen features learn what they would learn alone, and leave nothing behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.models import tiny
from tunewise.core.errors import UserError
from tunewise.core.forward import Forward
from tunewise.core.handle import attach
from tunewise.core.run import Run
from tunewise.data import Columns
from tunewise.loop.evaluate import predict_rows
from tunewise.loop.features import Features, frozen_features
from tunewise.loop.settings import Settings
from tunewise.prepare import complete
from tunewise.task.classification import Classification

MANY = 2**24
TOP_LORA = 'lora(sites="linear & layers[-2:]")'
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 99,
}
SIZES |= {"intermediate_size": 48, "pad_token_id": 0, "max_position_embeddings": 32}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", SIZES),
    "roberta": ("RobertaConfig", SIZES),
    "llama": ("LlamaConfig", {**SIZES, "num_key_value_heads": 2}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 99, "pad_token_id": 0}),
}


def model(kind: str, auto: str = "AutoModelForSequenceClassification", seed: int = 0) -> nn.Module:
    name, options = KINDS[kind]
    torch.manual_seed(seed)
    made: nn.Module = getattr(transformers, auto).from_config(getattr(transformers, name)(**options))
    return made


def examples(count: int, seed: int) -> list[dict[str, Any]]:
    make = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        ids = torch.randint(
            3, 99, (int(torch.randint(3, 12, (1,), generator=make)),), generator=make
        ).tolist()
        found.append({"id": f"{seed}-{i}", "input_ids": ids, "labels": ids[0] % 2, "length": len(ids)})
    return found


def run_of(net: nn.Module, method: str, side: str | None = None, **options: Any) -> Run:
    task = Classification(Columns(("text",), "label", "classification", [], ()))
    task.labels = ["even", "odd"]
    recipe = complete(method, task, net.config)
    for head in recipe["head"]:
        head.setup(task, None, net)  # type: ignore[attr-defined]
    task.pad_side = side or task.pad_side
    torch.manual_seed(1)
    handle = attach(net, recipe)
    settings = Settings.of(**{"lr": 3e-3, "batch_size": 4, "epochs": 2, "eval_batch_size": 5, **options})
    run = Run(handle, data={"train": examples(18, 0), "valid": examples(7, 1)}, task=task, settings=settings)
    run.tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2, padding_side="right")
    return run


def learn(
    run: Run, store: dict[Any, Any], limit: int = MANY, order: int | None = None
) -> tuple[Features, list[float], list[Any], Tensor]:
    """(what was shared, losses of the steps, predictions on new rows, what the head says on them)."""
    losses: list[float] = []
    run.listen = lambda row: losses.append(row["loss"]) if "loss" in row else None
    torch.manual_seed(2)
    new = examples(9, 5)
    with frozen_features(run, store, limit_bytes=limit, order=order) as features:
        run.recipe.single("loop").run(run)  # type: ignore[union-attr]
        predicted, _ = predict_rows(run, new)
        run.model.eval()
        with torch.no_grad():
            logits = run.forward(run.collate(new))[0]
    return features, losses, predicted, logits


@pytest.mark.parametrize(
    ("kind", "method", "side", "blocks"),
    [
        ("bert", "head_only", "right", 4),
        ("bert", "partial", "right", 2),
        ("bert", "ladder", "right", 4),
        ("bert", TOP_LORA, "right", 2),
        ("roberta", "head_only", "right", 4),
        ("roberta", "partial", "right", 2),
        ("llama", "head_only", "left", 4),
        ("llama", "head_only", "right", 4),
        ("llama", TOP_LORA, "left", 2),
        ("llama", "ladder", "right", 4),
        ("llama", "partial", "left", 2),
        ("gpt2", TOP_LORA, "left", 2),
        ("gpt2", "head_only", "right", 4),
    ],
)
def test_shared_trials_equal_those_run_apart(kind: str, method: str, side: str, blocks: int) -> None:
    store: dict[Any, Any] = {}
    apart, *alone = learn(run_of(model(kind), method, side), {}, 0)
    first, *one = learn(run_of(model(kind), method, side), store)
    second, *two = learn(run_of(model(kind), method, side), store)
    assert first.blocks == second.blocks == apart.blocks == blocks
    assert (first.reason is None) == (blocks == 4)
    assert apart.served == 0 and first.computed == 34 and second.computed == 0
    assert second.served == first.served + first.computed == apart.computed
    for losses, predicted, logits in (one, two):
        assert losses == pytest.approx(alone[0], rel=1e-4)
        assert predicted == alone[1]
        torch.testing.assert_close(logits, alone[2], rtol=1e-3, atol=1e-4)
    ordered, *three = learn(run_of(model(kind), method, side), {}, order=5)
    assert ordered.served + 9 == first.served + first.computed and ordered.computed == 18 + 7 + 9
    assert three[0] == pytest.approx(alone[0], rel=1e-4) and three[1] == alone[1]


def test_the_exact_probe_shares() -> None:
    store: dict[Any, Any] = {}
    _, _, predicted, logits = learn(run_of(model("bert", "AutoModel"), "linear_probe"), {}, 0)
    learn(run_of(model("bert", "AutoModel"), "linear_probe"), store)
    features, _, again, shared = learn(run_of(model("bert", "AutoModel"), "linear_probe"), store)
    assert features.blocks == 4 and features.computed == 0 and features.served > 25
    assert again == predicted
    torch.testing.assert_close(shared, logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "method", ["lora", "prompt_tuning", "prefix_tuning", "full", "bias_scale", "lora + ladder"]
)
def test_what_changes_the_first_block_shares_nothing(method: str) -> None:
    store: dict[Any, Any] = {}
    run = run_of(model("bert"), method)
    with frozen_features(run, store, limit_bytes=MANY) as features:
        run.forward(run.collate(examples(3, 0)))
        assert "outputs" not in run.__dict__
    assert features.blocks == 0 and features.reason is not None
    assert features.reason.endswith(".") and not store


def test_a_method_in_the_middle_shares_what_is_below() -> None:
    run = run_of(model("bert"), 'lora(sites="query & layers[1]")')
    with frozen_features(run, {}, limit_bytes=MANY) as features:
        assert features.blocks == 1
        assert "LoRA changes bert.encoder.layer.1.attention.self.query" in str(features.reason)


@pytest.mark.parametrize(
    ("kind", "side", "positions", "reason"),
    [
        ("gpt2", "left", False, "depend on the rows that share its batch"),  # counts padding as positions
        ("bert", "left", False, "answers differently|depend on the rows"),  # reads the first column, a pad
    ],
)
def test_what_depends_on_padding_shares_nothing(kind: str, side: str, positions: bool, reason: str) -> None:
    run = run_of(model(kind), "head_only", side)
    run.task.position_ids = positions
    with frozen_features(run, {}, limit_bytes=MANY) as features:
        assert features.blocks == 0
    assert any(part in str(features.reason) for part in reason.split("|"))


@pytest.mark.parametrize(
    ("name", "reason"), [("albert", "once each"), ("t5", "encoder-decoder"), ("gpt2", "output_hidden_states")]
)
def test_models_that_are_no_plain_stack_share_nothing(name: str, reason: str) -> None:
    net = tiny(name)
    net.config.output_hidden_states = name == "gpt2"
    run = run_of(net, "lora(sites='linear & layers[-1]') + LMHead()" if name != "albert" else "head_only")
    if name == "t5":
        run.collate = lambda rows: SimpleNamespace(inputs={})  # type: ignore[method-assign,assignment]
    with frozen_features(run, {}, limit_bytes=MANY) as features:
        assert features.blocks == 0
    assert reason in str(features.reason)


def overrides(net: nn.Module) -> list[Any]:
    found = [m.__dict__["forward"] for m in net.modules() if "forward" in m.__dict__]
    return [f.base if isinstance(f, Forward) else f for f in found]


@pytest.mark.parametrize("method", ["partial", "ladder", "head_only"])
def test_nothing_is_left_behind_also_after_an_exception(method: str) -> None:
    net = model("bert")
    run = run_of(net, method)
    before, state, rng = (
        overrides(net),
        {k: v.clone() for k, v in net.state_dict().items()},
        torch.get_rng_state(),
    )
    run.model.train()
    modes = [m.training for m in net.modules()]
    batch = run.collate(examples(5, 3))
    with pytest.raises(RuntimeError, match="stop"), frozen_features(run, {}, limit_bytes=MANY) as features:
        assert torch.equal(torch.get_rng_state(), rng)
        assert len(overrides(net)) >= features.blocks > 0
        run.forward(batch)
        raise RuntimeError("stop")
    assert [m.training for m in net.modules()] == modes
    assert overrides(net) == before and "outputs" not in run.__dict__
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    after = net.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[k], state[k]) for k in state)
    run.handle.detach()
    assert not overrides(net)


def test_trying_keeps_the_random_state() -> None:
    run = run_of(model("bert"), "partial")
    plain = run.collate

    def drawing(rows: list[dict[str, Any]]) -> Any:
        torch.rand(1)
        return plain(rows)

    run.collate = drawing  # type: ignore[method-assign]
    state = torch.get_rng_state()
    with frozen_features(run, {}, limit_bytes=MANY) as features:
        assert features.blocks == 2 and torch.equal(torch.get_rng_state(), state)


def test_a_handle_detached_inside_leaves_nothing_either() -> None:
    net = model("bert")
    run = run_of(net, "ladder")
    with frozen_features(run, {}, limit_bytes=MANY) as features:
        assert features.blocks == 4
        run.handle.detach()
    assert not overrides(net)


def test_the_limit_is_kept_and_results_stay_equal() -> None:
    store: dict[Any, Any] = {}
    limit = 15_000
    _, *alone = learn(run_of(model("bert"), "partial"), {}, 0)
    features, *some = learn(run_of(model("bert"), "partial"), store, limit)
    assert 0 < sum(v.nbytes for v in store.values()) <= limit
    assert features.served > 0 and features.computed > 32
    assert some[0] == pytest.approx(alone[0], rel=1e-4) and some[1] == alone[1]


def test_the_store_tells_weights_depths_rows_and_precisions_apart() -> None:
    store: dict[Any, Any] = {}

    def computed(net: nn.Module, method: str, rows: list[dict[str, Any]], half: bool = False) -> int:
        run = run_of(net, method)
        run.model.eval()
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
        with frozen_features(run, store, limit_bytes=MANY) as features, torch.no_grad(), autocast:
            run.forward(run.collate(rows))
        run.handle.detach()
        return features.computed

    rows, net = examples(4, 3), model("bert")
    assert computed(net, "head_only", rows) == 4
    assert computed(net, "head_only", rows[2:]) == 0
    assert computed(net, "ladder", rows[:1]) == 1  # the states of the lower blocks are new
    assert computed(net, "partial", rows) == 3  # of which the ladder has kept one row
    cut = [{**row, "input_ids": row["input_ids"][:-1]} for row in rows]
    assert computed(net, "head_only", cut) == 4
    assert computed(net, "head_only", rows, half=True) == 4
    other = model("bert", "AutoModel", seed=3)
    other.load_state_dict(net.bert.state_dict())  # type: ignore[operator,union-attr,arg-type]
    assert computed(other, "linear_probe", rows) == 0  # the same blocks under another head
    with torch.no_grad():
        net.bert.encoder.layer[3].output.dense.weight[0, 0] += 1.0  # type: ignore[index,union-attr,operator]
    assert computed(net, "partial", rows) == 0
    assert computed(net, "head_only", rows) == 4


def test_kept_rows_are_computed_in_evaluation_mode_and_train_the_top_with_gradients() -> None:
    run = run_of(model("bert"), "partial")
    batch = run.collate(examples(4, 3))
    seen: list[Tensor] = []
    with frozen_features(run, {}, limit_bytes=MANY):
        fifth = run.model.bert.encoder.layer[2]  # type: ignore[union-attr,index]
        hook = fifth.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        run.model.train()
        run.loss(batch, 4.0).backward()
        run.loss(batch, 4.0)
        run.model.eval()
        run.forward(batch)
        hook.remove()
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert all(i.tensor.grad is not None for i in run.handle.tensors().values())


def test_gradient_checkpointing_gives_the_same() -> None:
    _, *plain = learn(run_of(model("bert"), "partial"), {}, 0)
    _, *checkpointed = learn(run_of(model("bert"), "partial", gradient_checkpointing=True), {})
    assert checkpointed[0] == pytest.approx(plain[0], rel=1e-4)
    assert checkpointed[1] == plain[1]


@pytest.mark.parametrize("method", ["lst(reduction=4)", "lora + ladder"])
def test_checkpointing_is_refused_where_it_saves_nothing(method: str) -> None:
    run = run_of(model("bert"), method, gradient_checkpointing=True)
    with pytest.raises(
        UserError, match="saves nothing with Ladder.*: beside a side network the backbone stays"
    ):
        run.recipe.single("loop").run(run)  # type: ignore[union-attr]
    assert not run.model.is_gradient_checkpointing


def test_another_active_adaptation_is_computed_for_real() -> None:
    run = run_of(model("bert"), "head_only")
    batch = run.collate(examples(4, 3))
    run.model.eval()
    with frozen_features(run, {}, limit_bytes=MANY), torch.no_grad():
        base = run.outputs(batch).logits
        lower = attach(run.model, 'lora(sites="query & layers[0]")', name="lower")
        for info in lower.tensors().values():
            info.tensor.normal_()
        assert not torch.allclose(run.outputs(batch).logits, base)
        lower.detach()
    run.handle.detach()
    assert not overrides(run.model)
