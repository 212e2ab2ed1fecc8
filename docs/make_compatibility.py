"""docs/compatibility.md: which forms of deltas stand together on one backbone, tried pair by pair.

    python docs/make_compatibility.py        # or `make compatibility`

Every pair is attached as one adaptation to a small encoder and a small decoder, moved off its start, run, saved and
restored on a fresh base. A cell is "yes" when both act, gradients reach all that is trained, and the restored answer
is the same bit for bit; a pair that is refused gets the sentence. Nothing is written by hand.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tunewise as tw
from tunewise.core.checkpoint import write_text
from tunewise.core.errors import UserError

FILE = Path(__file__).parent / "compatibility.md"
FORMS = {
    "LoRA": ("lora(rank=4)", 'lora(rank=2, sites="value")'),
    "adapter": ("series_adapter(size=4)", "parallel_adapter(size=4)"),
    "prompt": ("prompt_tuning(tokens=3)", "p_tuning(tokens=2)"),
    "prefix": ("prefix_tuning(tokens=3, hidden=8)", "vpt(tokens=2)"),
    "side network": ("ladder(reduction=4)", "unipt"),
    "side network in its place": ("lst(reduction=4)", "lst(reduction=2)"),
    "experts": ("mola(experts=4, rank=2)", "loramoe(experts=3, rank=2)"),
    "mask": ("r_amt", "r_amt(threshold=4e-3)"),
    "existing weights": ('partial(sites="layers[-1]")', "layernorm_tuning"),
}
"""What stands for a form, and its companion where a form meets itself."""
INTRODUCTION = """# What goes together

Written by `make compatibility`; not by hand. Each pair of forms was attached as one adaptation (`a + b`) to a small
encoder (BERT) and a small decoder (Llama), moved off its start, run forward and backward, saved, and restored on a
fresh base.

- **yes**: both change the answer, every trained tensor gets a gradient, all values are finite, the restored
  adaptation answers the same bit for bit, and detaching gives the base back
- **on encoder**, **on decoder**: only there; **no**: refused, in the words below

A side network adds to the backbone's answer; one *in its place* gives the answer alone, from states that nothing is
sent back through, so that nothing before its place could learn beside it.

"""


def bases() -> dict[str, nn.Module]:
    """A random encoder and a random decoder, three layers each."""
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bert = BertForSequenceClassification(BertConfig(vocab_size=99, **sizes))
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=99, num_key_value_heads=2, **sizes))
    return {"encoder": bert.eval(), "decoder": llama.eval()}


def batch() -> dict[str, Tensor]:
    """Two rows, one of them padded."""
    ids = torch.randint(3, 99, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def moved(handle: tw.Handle) -> tw.Handle:
    """Every trained tensor off its start, the same for the same names."""
    for name, info in handle.tensors().items():
        make = torch.Generator().manual_seed(sum(name.encode()))
        info.tensor.add_(torch.randn(info.tensor.shape, generator=make) * 0.05)
    return handle


def answer(model: Any) -> Tensor:
    return model(**batch()).logits  # type: ignore[no-any-return]


def tried(make: Callable[[], nn.Module], first: str, second: str) -> str | None:
    """None when the two work together on this base, else the sentence that refuses them.

    Raises `AssertionError` where they are neither refused nor right.
    """
    model = make()
    with torch.no_grad():
        plain = answer(model)
    try:
        handle = moved(tw.attach(model, f"{first} + {second}", seed=0))
        found = answer(model)
    except UserError as error:
        return str(error)
    both = f"{first} + {second}"
    assert found.isfinite().all(), f"{both}: the answer is not finite"
    alone = []
    for one in (first, second):
        other = make()
        moved(tw.attach(other, one, seed=0))
        alone.append(answer(other).detach())
    for name, value in zip((second, first), alone, strict=True):
        assert not torch.allclose(found, value, atol=1e-6), f"{both}: {name} does nothing"
    found.square().sum().backward()
    infos = handle.tensors()
    for name, info in infos.items():
        grad = info.tensor.grad
        assert grad is not None and grad.any(), f"{both}: no gradient reaches {name}"
        assert grad.isfinite().all(), f"{both}: {name} has a gradient that is not finite"
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        wanted = answer(model)
        path = Path(folder) / "adaptation"
        for info in handle.tensors().values():
            info.tensor.grad = None
        handle.save(path)
        other = make()
        tw.restore(other, path)
        assert torch.equal(answer(other), wanted), f"{both}: the restored answer differs"
        handle.detach()
        assert torch.equal(answer(model), plain), f"{both}: detaching leaves another base"
    return None


def pairs() -> list[tuple[str, str]]:
    """Every form with every other and with itself."""
    names = list(FORMS)
    return [(a, b) for i, a in enumerate(names) for b in names[i:]]


def recipes(a: str, b: str) -> tuple[str, str]:
    """What is attached for a pair of forms."""
    return FORMS[a][0], FORMS[b][a == b]


def results() -> dict[tuple[str, str], dict[str, str | None]]:
    """For every pair and base: None where it works, else the refusal."""
    import copy

    kept = bases()
    return {
        (a, b): {
            name: tried(lambda m=model: copy.deepcopy(m), *recipes(a, b)) for name, model in kept.items()
        }
        for a, b in pairs()
    }


def cell(found: dict[str, str | None]) -> str:
    works = [base for base, said in found.items() if said is None]
    if works:
        return "yes" if len(works) == len(found) else f"on {works[0]}"
    return "no"


def render() -> str:
    """The whole page."""
    found = results()
    names = list(FORMS)
    lines = [f"| | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    for a in names:
        row = [cell(found.get((a, b)) or found[(b, a)]) for b in names]
        lines.append(f"| **{a}** | {' | '.join(row)} |")
    lines += ["", "What stood for each form:", ""]
    lines += [f"- {name}: `{one}`; with itself `{one} + {two}`" for name, (one, two) in FORMS.items()]
    said = [
        f"- {a} + {b} on {base}: {text}" for (a, b), on in found.items() for base, text in on.items() if text
    ]
    lines += ["", "## What is refused", "", *(said or ["Nothing: every pair works on both."])]
    return INTRODUCTION + "\n".join(lines) + "\n"


if __name__ == "__main__":
    write_text(FILE, render())
