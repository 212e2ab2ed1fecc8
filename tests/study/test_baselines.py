"""Baselines: majority and TF-IDF, measured as the tasks measure."""

from __future__ import annotations

import pytest

from tunewise.core.errors import UserError
from tunewise.data import Columns
from tunewise.study import majority, tfidf

COLUMNS = Columns(("text",), "label", "classification")
TRAIN = [{"text": f"good film number {i}", "label": "pos"} for i in range(8)]
TRAIN += [{"text": f"bad film number {i}", "label": "neg"} for i in range(6)]
TEST = [{"text": "a good one", "label": "pos"}, {"text": "a bad one", "label": "neg"}] * 10


def test_majority() -> None:
    found = majority(TRAIN, TEST, COLUMNS)
    assert found["accuracy"] == found["balanced_accuracy"] == 0.5
    assert found["macro_f1"] == pytest.approx(1 / 3)
    assert found["trainable"] == 0
    # Wilson's interval of 10 of 20, as printed in textbooks.
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx((0.2993, 0.7007), abs=1e-4)


def test_equal_classes_are_decided_by_name() -> None:
    rows = [{"text": "x", "label": label} for label in ("b", "a")]
    assert majority(rows, [{"text": "y", "label": "a"}], COLUMNS)["accuracy"] == 1.0


def test_tfidf_learns_words() -> None:
    assert tfidf(TRAIN, TEST, COLUMNS)["accuracy"] == 1.0


def test_tfidf_reads_sequences_without_spaces() -> None:
    rows = [{"text": "KKLLKKAA" + "KL" * i, "label": "yes"} for i in range(5)]
    rows += [{"text": "GGSSGGTT" + "SG" * i, "label": "no"} for i in range(5)]
    assert tfidf(rows, [{"text": "LKLKLK", "label": "yes"}], COLUMNS)["accuracy"] == 1.0


def test_one_class_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be fitted"):
        tfidf(TRAIN[:8], TEST, COLUMNS)


def test_no_labels_is_refused() -> None:
    with pytest.raises(UserError, match="label column"):
        majority(TRAIN, TEST, Columns(("text",), None, "causal"))
