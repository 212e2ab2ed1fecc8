"""Transformer Copilot: its card's checks, the log of mistakes, evaluation, keeping."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conformance.support import perturb
from tests.models import VOCAB, tiny
from tunewise.core.errors import UserError
from tunewise.core.handle import attach, restore
from tunewise.core.recipe import Recipe
from tunewise.delta.lora import LoRA
from tunewise.head import Copilot
from tunewise.head.copilot import Steps, rectified, seen_states, supervised_slots
from tunewise.loop.evaluate import evaluate
from tunewise.objective.mistakes import LOG, MistakeLoss, mistakes
from tunewise.objective.task_loss import TaskLoss

from .copilot_runs import answer, batch_of, moved, pair_batch, rows, run_of, train


def test_without_strength_and_at_the_start_it_is_the_pilot() -> None:
    batch = batch_of()
    model, handle, t = moved(strength=0.0)
    plain = model(**batch.inputs).logits
    assert torch.equal(answer(model, t, batch), plain)
    model = tiny("llama")
    t = next(t for _, _, t in attach(model, "copilot", seed=0).sites if t.part.slot == "head")
    with torch.no_grad():
        plain = model(**batch.inputs).logits
    scored, _ = supervised_slots(t, batch)
    assert torch.allclose(answer(model, t, batch)[scored], plain.log_softmax(-1)[scored], atol=1e-5)
    assert torch.equal(answer(model, t, batch)[~scored], plain[~scored])
    model.train()
    assert torch.equal(t.part.logits(t, SimpleNamespace(logits=plain), batch), plain)


def test_errors_sum_to_zero_and_a_perfect_correction_is_certain() -> None:
    run = run_of("copilot(top=5)")
    batch = run.collate(list(run.streams.data["train"]))
    outputs = run.outputs(batch)
    part: Any = run.recipe["objective"][1]
    t = next(t for _, _, t in run.handle.sites if t.part.slot == "head")
    part._write(run, t, batch, outputs)
    log = run.store(LOG)
    assert len(log) == 8
    for i, name in enumerate(batch.ids):
        errors = mistakes(log[name], VOCAB)
        assert errors.shape == (4, VOCAB) and float(errors.sum(1).abs().max()) < 1e-6
        n = int(batch.inputs["attention_mask"][i].sum())
        gold = batch.inputs["input_ids"][i, n - 4 : n]
        p = outputs.logits[i, n - 5 : n - 1].softmax(-1)
        true = torch.nn.functional.one_hot(gold, VOCAB) - p
        top = p.topk(4).indices
        assert torch.allclose(errors.gather(1, top), true.gather(1, top), atol=1e-6)
        assert torch.allclose(errors.gather(1, gold[:, None]), true.gather(1, gold[:, None]), atol=1e-6)
        certain = rectified(p, true, 1.0, 0.0).exp()
        assert torch.allclose(certain, torch.nn.functional.one_hot(gold, VOCAB).float(), atol=1e-5)


def test_an_untruncated_entry_is_exact() -> None:
    p = torch.rand(3, VOCAB).softmax(1)
    entry = {"p": p, "words": torch.arange(VOCAB).expand(3, -1), "gold": torch.tensor([4, 0, 98])}
    wanted = torch.nn.functional.one_hot(entry["gold"], VOCAB) - p
    assert torch.allclose(mistakes(entry, VOCAB), wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_token_changes_no_correction_before_it(name: str) -> None:
    model, _, t = moved(name)
    batch = pair_batch() if name == "t5" else batch_of((9, 9))
    before = answer(model, t, batch)
    for i in (3, 6):
        other = copy.deepcopy(batch)
        if name == "t5":
            other.inputs["decoder_input_ids"][:, i + 1] = 50
            other.labels[:, i] = 50
            last = i
        else:
            other.inputs["input_ids"][:, i] = 50
            other.labels[:, i] = 50
            last = i - 1
        after = answer(model, t, other)
        assert torch.allclose(after[:, : last + 1], before[:, : last + 1], atol=1e-5)
        assert not torch.allclose(after[:, last + 1 :], before[:, last + 1 :], atol=1e-3)


def test_training_reads_true_errors_causally() -> None:
    """What the decoder is trained on agrees with the same decoder run token by token on the same errors."""
    run = run_of("copilot")
    part: Any = run.recipe["objective"][1]
    perturb(run.handle, 3)
    batch = run.collate(rows(3))
    t = next(t for _, _, t in run.handle.sites if t.part.slot == "head")
    outputs = run.outputs(batch)
    part._write(run, t, batch, outputs)
    entry = run.store(LOG)["1"]
    from tunewise.objective.mistakes import _distances

    together = _distances(t.part, t, [entry, run.store(LOG)["0"]], torch.device("cpu"))[:4]
    X, _, h, _ = seen_states(t, outputs, batch.inputs)
    errors, steps, found = mistakes(entry, VOCAB), Steps(t.part, t), []
    for i, slot in enumerate(entry["slots"].tolist()):
        new = slice(0, slot + 1) if i == 0 else slice(slot, slot + 1)
        at = torch.arange(new.start, new.stop)[None]
        real = torch.ones_like(at, dtype=torch.bool)
        for states in (X[1:2, new], h[1:2, new]):
            steps.remember(states, real, at, at)
        here = torch.tensor([slot])
        f = steps.next(None if i == 0 else errors[i - 1 : i], here, here)
        found.append((f - errors[i : i + 1]).norm())
    assert torch.allclose(together, torch.stack(found), atol=1e-5)


def test_no_gradient_of_the_copilot_reaches_the_pilot() -> None:
    run = run_of("copilot")
    perturb(run.handle, 3)
    part: Any = run.recipe["objective"][1]
    batch = run.collate(rows(4))
    logits, outputs = run.forward(batch)
    part.loss(run, batch, logits, outputs, 1.0)
    part.before_step(run)
    part.loss(run, batch, logits, outputs, 1.0).backward()
    touched = {n for n, i in run.handle.tensors().items() if i.tensor.grad is not None}
    assert touched and all(n.startswith("copilot.") for n in touched)
    assert touched == {n for n in run.handle.tensors() if n.startswith("copilot.")}


def test_the_pilot_is_trained_as_it_would_be_alone() -> None:
    """Bit by bit, although gradients are clipped by their norm."""
    resting = Recipe(delta=LoRA(), head=Copilot(), objective=[TaskLoss(), MistakeLoss(weight=0.0)])
    both, idle, alone = (train(run_of(m, lr=3e-2)) for m in ("copilot(rows=4)", resting, "lora"))
    for name, value in alone.items():
        assert torch.equal(both[name], idle[name]), name
        assert torch.allclose(both[name], value, atol=1e-4), name  # which takes the loss from hidden states
    assert not torch.equal(both["copilot.words_out"], idle["copilot.words_out"])


def test_the_log_is_bounded_and_survives_a_kill(tmp_path: Path) -> None:
    options = {"steps": 6, "checkpoint_every": 3}
    method = "copilot(rows=3, capacity=5)"
    wanted_run = run_of(method, tmp_path / "whole", **options)
    wanted = train(wanted_run)
    assert len(wanted_run.store(LOG)) == 5 and wanted_run.metrics["copilot_loss"] > 0

    class Killed(Exception):
        pass

    killed = run_of(method, tmp_path / "parts", **options)

    def listen(row: dict[str, Any]) -> None:
        if row["step"] == 4:
            raise Killed

    killed.listen = listen
    with pytest.raises(Killed):
        train(killed)
    again = run_of(method, tmp_path / "parts", **options)
    torch.manual_seed(5)
    found = train(again)
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    for name, entry in wanted_run.store(LOG).items():
        assert all(torch.equal(again.store(LOG)[name][k], v) for k, v in entry.items())


def test_accumulation_changes_no_draw() -> None:
    one, two = (train(run_of("copilot(rows=3)", steps=3, micro_batch=n)) for n in (4, 2))
    for name, value in one.items():
        assert torch.allclose(two[name], value, atol=1e-3), name


def test_it_learns_the_mistakes_and_helps() -> None:
    """On rows whose answers follow a rule that the frozen Pilot cannot learn, loss falls by the Copilot alone."""
    recipe = Recipe(
        delta=LoRA(rank=1, sites="layers[0] & query"),
        head=Copilot(),
        objective=[TaskLoss(weight=0.0), MistakeLoss(rows=8)],
    )
    run = run_of(recipe, steps=60, lr=1e-2, schedule="constant")
    train_rows = list(run.streams.data["train"])
    before = evaluate(run, train_rows)
    train(run)
    after = evaluate(run, train_rows)
    assert after["token_accuracy"] > before["token_accuracy"] + 0.3
    assert after["loss"] < before["loss"] - 0.3


def test_saved_in_one_folder_and_restored(tmp_path: Path) -> None:
    model, handle, t = moved(width=16)
    batch = batch_of()
    wanted = answer(model, t, batch)
    ids = batch.inputs["input_ids"][:1, :4]
    said = model.generate(ids, max_new_tokens=6, do_sample=False)
    folder = handle.save(tmp_path / "one")
    assert {p.name for p in folder.iterdir()} == {"adaptation.json", "adaptation.safetensors"}
    other = tiny("llama")
    again = restore(other, folder)
    t2 = next(t for _, _, t in again.sites if t.part.slot == "head")
    assert torch.equal(answer(other, t2, batch), wanted)
    assert torch.equal(other.generate(ids, max_new_tokens=6, do_sample=False), said)  # type: ignore[operator]


def test_starts_from_llamas_own_blocks_or_at_random() -> None:
    model = tiny("llama")
    t = next(t for _, _, t in attach(model, "copilot", seed=0).sites if t.part.slot == "head")
    block: Any = model.get_submodule("model.layers.0")
    assert torch.equal(t.q0, block.self_attn.q_proj.weight) and torch.equal(
        t.down0, block.mlp.down_proj.weight
    )
    assert torch.equal(t.words_in, model.get_input_embeddings().weight) and not t.words_out.any()  # type: ignore[operator]
    for name, width in (("gpt2", None), ("llama", 16), ("t5", None)):
        part = Copilot(width=width, layers=4)
        other = tiny(name)
        handle = attach(other, Recipe(head=part))
        assert handle.trainable == part.formula(handle.sites[0][1])


def test_merged_pilots_keep_their_copilot_and_exports_say_no(tmp_path: Path) -> None:
    model, handle, t = moved()
    batch = batch_of()
    wanted = answer(model, t, batch)
    ids = batch.inputs["input_ids"][:1, :4]
    said = model.generate(ids, max_new_tokens=5, do_sample=False)
    handle.merge()
    assert torch.allclose(answer(model, t, batch), wanted, atol=1e-3)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), said)
    handle.unmerge()
    from tunewise.interop.export import export

    with pytest.raises(UserError, match="no place for Copilot"):
        export(handle, "hf", tmp_path / "out")
    handle.detach()
    assert "generate" not in vars(model)


def test_refused() -> None:
    with pytest.raises(UserError, match="reads to the right as well"):
        attach(tiny("roberta"), "copilot")
    with pytest.raises(UserError, match="multiple of"):
        attach(tiny("llama"), "copilot(width=33)")
    model = tiny("llama")
    attach(model, "copilot", name="one")
    with pytest.raises(UserError, match="Two Copilots"):
        attach(model, "copilot", name="two")
        from tunewise.core.adaptation import handles

        handles(model)["one"].activate(only=False)
    model, _, t = moved()
    with pytest.raises(UserError, match="output_hidden_states=True"):
        t.part.logits(t, model(**batch_of().inputs), batch_of())
    run = run_of("lora")
    with pytest.raises(UserError, match="the recipe has none"):
        MistakeLoss().loss(run, None, torch.zeros(1), None, 1.0)
