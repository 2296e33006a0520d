"""train.experiments: the tables say what was computed, and it is what the lecture says."""

from __future__ import annotations

from dataclasses import replace

import pytest

import data
from train.experiments import EXPERIMENTS
from train.material import prepare
from train.recipes import RECIPES

SEED = 2147483647


@pytest.fixture(scope="module")
def material():
    return prepare(data.read_names(None))


@pytest.fixture
def short(monkeypatch):
    """Return a function that shortens recipes."""

    def shorten(steps, *names):
        for name in names:
            monkeypatch.setitem(RECIPES, name, replace(RECIPES[name], steps=steps))

    return shorten


def rows(name, material, table=0):
    return [dict(zip(found.headings, row, strict=True))
            for found in [EXPERIMENTS[name].run(material, SEED)[table]] for row in found.rows]  # fmt: skip


def test_an_example_jitters_with_its_company_in_training_and_stands_still_in_eval(material, short):
    short(20, "deep")
    for row in rows("jitter", material):
        assert float(row["in training"]) > 0.1
        assert row["in eval"] == "exactly 0"


def test_a_linear_scales_by_the_root_of_the_fan_in_and_batchnorm_undoes_it(material):
    found = {row["std of the weights"]: row for row in rows("scale", material)}
    for name, factor in (("1", 1), ("5", 5), ("0.2", 0.2), ("1 / sqrt(10)", 10**-0.5)):
        row = found[name]
        assert float(row["output"]) == pytest.approx(factor * 10**0.5, rel=0.06)
        assert float(row["input gradient"]) == pytest.approx(factor * 200**0.5, rel=0.06)
        assert float(row["output, BatchNorm"]) == pytest.approx(1, abs=0.002)
        same = float(found["1"]["input gradient, BatchNorm"])
        assert float(row["input gradient, BatchNorm"]) == pytest.approx(same, abs=0.003)


def test_fifty_layers_explode_backwards_unless_normalised(material):
    plain, normal, kaiming = (list(row.values()) for row in rows("depth", material))
    assert float(plain[-1]) > 1e12
    assert float(normal[-1]) < 1e4
    assert float(normal[3]) == pytest.approx(0.63, abs=0.02)
    assert float(kaiming[3]) == pytest.approx(0.65, abs=0.03)


def test_a_bias_before_batchnorm_does_not_move(material):
    for row in rows("bias", material):
        _, weight, bias, moved, bias_moved = row.values()
        assert float(bias) < 1e-5 * float(weight)
        assert float(bias_moved) < 1e-6 * float(moved)


def test_one_at_a_time_is_the_same_in_eval_and_refused_in_training(material, short):
    short(20, "deep")
    (_, in_eval), (_, in_training) = (row.values() for row in rows("single", material))
    assert float(in_eval) < 1e-4
    assert "one value per channel" in in_training


def test_fast_running_statistics_are_further_from_the_calibrated_ones(material, short):
    short(600, "lecture")
    fast, slow = (row["ratio of stds"].split(" to ") for row in rows("momentum", material))
    assert float(fast[1]) - float(fast[0]) > 0.05
    assert float(slow[0]) > 0  # 600 steps at 0.001: about half of the way from where they began


def test_most_dead_relus_stay_dead(material):
    """25 to 46 % were killed in ten seeds and six roundings, and 0.82 to 0.99 of them stayed: lower layers move."""
    before, killed, later = (float(row["dead, second layer"][:-1]) for row in rows("relus", material))
    assert before == 0
    assert killed > 10
    assert later > 0.5 * killed


def test_the_loss_from_zeros_is_the_unigram_loss_and_the_divergence(material, short):
    short(150, "zeros", "zeros-batchnorm")
    for row in rows("zeros", material, -1):
        assert float(row["difference"]) == pytest.approx(float(row["KL(letters || net)"]), abs=1.1e-4)
        assert row["what a context changes"] == "exactly 0"
    for table, mover in ((0, "linear3.bias"), (1, "bn3.bias")):
        still = {row["parameter"]: row for row in rows("zeros", material, table)}
        assert [name for name, row in still.items() if row["largest change"] != "stood still"] == [mover]
        assert all(row["why it is 0"] for name, row in still.items() if name != mover)


def test_folded_nets_are_without_batchnorms_and_compute_the_same(material, short):
    short(20, "batchnorm", "lecture", "deep")
    found = rows("folding", material)
    assert [row["BatchNorms"] for row in found] == ["1", "0", "3", "0", "6", "0"]
    for before, after in zip(found[::2], found[1::2], strict=True):
        assert (before["train"], before["dev"]) == (after["train"], after["dev"])
        assert before["first names"] == after["first names"]
        assert all(float(part.split()[1]) < 1e-5 for part in after["off, of the largest logit"].split(", "))
