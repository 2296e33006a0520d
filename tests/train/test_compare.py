"""train.compare and train.sample: two checkpoints side by side, and names from either."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import bnfold
import train.__main__ as command
import train.sample as sample
from bnfold.checkpoint import Checkpoint, InputDomain, drop_identities, load, save
from bnfold.errors import InputError
from tests.train.names import NAMES
from train.compare import compare, load_side


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Three checkpoints on one list: a net, the same folded, and one of another recipe and context."""
    folder = tmp_path_factory.mktemp("nets")
    (folder / "names.txt").write_text("\n".join(NAMES))
    names = ["--names", str(folder / "names.txt"), "--hidden", "8"]
    assert command.main([*names, "--steps", "30", "-o", str(folder / "a.pt")]) == 0
    other = ["--recipe", "kaiming", "--context", "2", "--steps", "5", "--seed", "7"]
    assert command.main([*names, *other, "-o", str(folder / "c.pt")]) == 0
    found = load(folder / "a.pt")
    folded, _ = bnfold.fold(found.model, found.input.sample(8), verify=False)
    save(folder / "b.pt", replace(found, model=drop_identities(folded), folded={"verdicts": []}))
    return {path.stem: str(path) for path in folder.iterdir()}


def read(paths, left, right):
    """Return the rows of the comparison by their heading."""
    sides = (load_side(paths[name], NAMES) for name in (left, right))
    tables = compare(*sides, (left, right), 5, 1)
    return {row[0]: row[1:] for table in tables for row in table.rows}


def test_a_folded_net_is_smaller_and_otherwise_the_same(paths):
    rows = read(paths, "a", "b")
    assert rows["BatchNorms"] == ("3", "0")
    assert rows["folded"] == ("no", "yes")
    record = load(paths["a"]).record["losses"]
    assert rows["dev loss"] == (f"{record['dev']:.4f}",) * 2
    for number in "12345":
        assert rows[number][0] == rows[number][1]
    assert max(map(float, rows["KL from the other, nats"])) < 1e-9
    assert rows["tanh1"][0] == rows["tanh1"][1]


def test_unlike_nets_differ_and_what_only_one_has_leaves_a_gap(paths):
    rows = read(paths, "a", "c")
    assert rows["recipe"] == ("quick", "kaiming")
    assert rows["seed"] == ("2147483647", "7")
    assert rows["steps taken"] == ("30", "5")
    assert rows["train loss"][0] != rows["train loss"][1]
    assert rows["tanh2"][1] == ""
    assert "KL from the other, nats" not in rows  # contexts of 3 and of 2


def test_the_distance_is_the_one_of_the_definition(paths):
    left, right = (load_side(paths[name], NAMES) for name in "ab")
    with torch.no_grad():
        right.net[-1].bias[1] += 1
    rows = {row[0]: row[1:] for table in compare(left, right, ("a", "b"), 1, 1) for row in table.rows}
    x = left.material.examples[0]
    p, q = (side.net(x).detach().double().log_softmax(1) for side in (left, right))
    expected = [float((one.exp() * (one - other)).sum(1).mean()) for one, other in ((p, q), (q, p))]
    assert [float(cell) for cell in rows["KL from the other, nats"]] == pytest.approx(expected, rel=5e-3)


def test_the_command_shows_both(paths, capsys):
    names = ["--names", paths["names"]]
    assert command.main(["--compare", paths["a"], paths["b"], *names]) == 0
    shown = capsys.readouterr().out
    assert "BatchNorms" in shown
    assert shown.count("names of") == 1


def test_another_list_and_other_files_are_refused(paths, tmp_path, capsys):
    with pytest.raises(InputError, match="other characters"):
        load_side(paths["a"], ["abc", "abd", "xyz", "yxz", "aaa", "bbb"])
    net = nn.Sequential(nn.Linear(3, 4))
    save(tmp_path / "n.pt", Checkpoint(net.eval(), InputDomain((3,)), (), {}))
    for path in (str(tmp_path / "n.pt"), paths["names"], "missing.pt"):
        assert sample.main([path]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    wrong = nn.Sequential(nn.Embedding(3, 4), nn.Flatten(), nn.Linear(8, 5))
    save(tmp_path / "w.pt", Checkpoint(wrong.eval(), InputDomain((2,), "int64", 0, 3), (".", "a", "b"), {}))
    with pytest.raises(InputError, match=r"gives \[5\] numbers for 3 characters"):
        sample.load_characters(str(tmp_path / "w.pt"))


def test_every_checkpoint_gives_names_and_a_seed_gives_the_same(paths, capsys):
    shown = {}
    for name in "abc":
        for seed in ("1", "1", "2"):
            assert sample.main([paths[name], "--count", "4", "--seed", seed]) == 0
            shown.setdefault((name, seed), set()).add(capsys.readouterr().out)
    assert all(len(texts) == 1 for texts in shown.values())
    assert shown["a", "1"] == shown["b", "1"] != shown["a", "2"]
    assert shown["a", "1"] != shown["c", "1"]
    assert len(shown["a", "1"].pop().splitlines()) == 4
