"""MiSS against the explicit tiled matrix, and its block affine variant against its inverse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.conformance import forward_checks, keeping_checks
from tests.conformance.support import Case
from tests.delta.small import attached, change_of, inputs, pair
from tunewise.catalog.lowrank.miss import miss
from tunewise.core.errors import UserError
from tunewise.delta.miss import BlockAffine, MiSS


@pytest.mark.parametrize("rank", [1, 4, 5, 8])
def test_output_and_change_equal_the_tiled_matrix(rank: int) -> None:
    model, handle = attached(MiSS(rank=rank), move=0.3)
    d = handle.tensors()["0.miss.D"].tensor.detach()
    tiled = torch.cat([d.T] * 12, 1)[:, :12]
    torch.testing.assert_close(change_of(handle), tiled)
    torch.testing.assert_close(model[0](inputs()), pair()[0](inputs()) + inputs() @ tiled.T)
    t = handle.sites[0][2]
    b, a = t.part.components(t)  # type: ignore[attr-defined]
    torch.testing.assert_close((b @ a).detach(), tiled)


def test_mini_repeats_its_columns_and_as_wide_as_out_it_is_the_default() -> None:
    _, handle = attached(MiSS(rank=4, mini=2), move=0.3)
    d = handle.tensors()["0.miss.D"].tensor.detach()
    assert d.shape == (4, 2)
    torch.testing.assert_close(change_of(handle), torch.cat([d.T] * 4).repeat(1, 3))


def test_dropout_comes_before_the_sum() -> None:
    part = MiSS(rank=4, dropout=0.5)
    model, handle = attached(part, move=0.3)
    model.train()
    y = torch.stack([model[0](inputs()) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(y, model.eval()[0](inputs()), rtol=0.0, atol=0.1)
    model, handle = attached(part)
    t = handle.sites[0][2]
    with torch.no_grad():
        t.D.copy_(torch.eye(4, 8))  # y shows the sums themselves
    sums = (model.train()[0](torch.ones(200, 12)) - pair()[0](torch.ones(1, 12)))[:, :4] / 2
    counts = sums.round().detach()
    torch.testing.assert_close(sums.detach(), counts)
    assert {*counts.flatten().tolist()} == {0.0, 1.0, 2.0, 3.0}  # of three blocks, each entry by itself


def test_block_affine_can_be_undone_block_by_block() -> None:
    _, handle = attached(BlockAffine(rank=2), move=0.2)
    d, W = handle.tensors()["0.block_affine.D"].tensor.detach(), pair()[0].weight.detach()
    new = W + change_of(handle)
    for a in range(4):
        for c in range(6):
            block = new[2 * a : 2 * a + 2, 2 * c : 2 * c + 2]
            back = (block - d[a]) @ torch.linalg.inv(torch.eye(2) + d[a])
            torch.testing.assert_close(back, W[2 * a : 2 * a + 2, 2 * c : 2 * c + 2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "check", ["check_identity", "check_gradients", "check_count", "check_merge", "check_detach"]
)
@pytest.mark.parametrize(("variant", "mini"), [("mini", 8), ("bat", None)])
def test_variants_keep_the_promises(check: str, variant: str, mini: int | None) -> None:
    case = Case("miss", lambda: miss(rank=8, variant=variant, mini=mini), "llama")
    found: Callable[[Case], None] = getattr(forward_checks, check, None) or getattr(keeping_checks, check)
    found(case)


def test_sizes_that_do_not_fit_are_refused() -> None:
    for part, words in (
        (MiSS(rank=13), "rank=13"),
        (MiSS(rank=4, mini=3), "mini=3"),
        (BlockAffine(rank=4), "rank=4"),
    ):
        with pytest.raises(UserError, match=words):
            attached(part)
    for options in ({"variant": "mini"}, {"mini": 2}, {"variant": "bat", "dropout": 0.1}, {"variant": "max"}):
        with pytest.raises(UserError, match="miss"):
            miss(**options)
