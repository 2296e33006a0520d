"""The pictures and the page: what is in the files, and what a browser makes of them where there is one."""

from __future__ import annotations

import re
import sys
from html import unescape
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnfold import InputError, calibrate
from bnfold.page import PAPER
from tests.browser import browse, contrast, needs_browser, style_in_jupyter
from train import page, plots
from train.diagnostics import Diagnostics, compare_statistics
from train.events import write_events


@pytest.fixture(scope="module")
def run():
    """A net with BatchNorm and with a dead neuron, and what was seen of four steps."""
    torch.manual_seed(0)
    hidden = nn.Linear(12, 8)
    net = nn.Sequential(
        nn.Embedding(27, 4), nn.Flatten(), hidden, nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 27)
    )
    net[3].bias.data[2] = 9
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    x, y = torch.randint(27, (40, 3)), torch.randint(27, (40,))
    with Diagnostics(net, every=2) as diagnostics:
        for _ in range(4):
            optimiser.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimiser.step()
            diagnostics.record(loss.item())
    return SimpleNamespace(diagnostics=diagnostics, statistics=compare_statistics(net, calibrate(net, [x])))


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "plots"
    plots.draw(run.diagnostics, folder, run.statistics, "Title <&>")
    return folder


def rgb(colour):
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def test_every_picture_is_a_file_of_valid_svg_in_ink_that_follows_the_reader(folder):
    names = ["activations", "gradients", "loss", "saturation", "statistics", "updates", "weights"]
    assert sorted(path.stem for path in folder.glob("*.svg")) == names
    for path in folder.glob("*.svg"):
        text = path.read_text()
        ElementTree.fromstring(text)
        assert "prefers-color-scheme:dark" in text
        assert "currentColor" in text
        assert not re.search(
            r"(fill|stroke): *#(000000|ffffff|010203)", text.replace("stroke: #ffffff; stroke-width: 0", "")
        )
        assert not re.findall(r"(?:href|src)=\"(?!#|data:)", text)


def test_the_same_numbers_give_the_same_bytes(run, folder):
    records = run.diagnostics.records
    assert plots.draw_saturation(records).svg == (folder / "saturation.svg").read_text()
    assert plots.draw_updates(run.diagnostics).svg == (folder / "updates.svg").read_text()


def test_every_line_stands_out_from_both_papers():
    papers = re.findall(r"--paper: (#\w{6})", PAPER)
    assert len(papers) == 2
    for colour in [*plots.COLOURS, *plots._colours(50)]:
        for paper in papers:
            assert contrast(rgb(colour), rgb(paper)) >= 3, (colour, paper)


def test_a_white_column_of_the_map_is_the_dead_neuron(run):
    layer = run.diagnostics.records[-1].layers[0]
    assert layer.dead_map.all(0).tolist() == [i == 2 for i in range(8)]
    assert layer.dead == 1 / 8


def test_a_net_of_many_layers_names_some_and_draws_the_std_of_all(run):
    record = run.diagnostics.records[0]
    layer = record.layers[0]
    many = type(record)(0, 3.0, (layer,) * 50, ())
    svg = plots.draw_activations(many).svg
    assert svg.count('<use xlink:href="#C') >= 50 or svg.count("<use ") >= 50
    assert (
        len(ElementTree.fromstring(svg).findall(".//{*}g[@id='legend_1']/{*}g[@id]")) <= 3 * plots._MOST_NAMED
    )


@pytest.mark.parametrize("value", [0.0, float("nan"), 1e30])
def test_nets_gone_wrong_are_drawn_as_well(value):
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Tanh())
    for parameter in net.parameters():
        nn.init.constant_(parameter, value)
    with Diagnostics(net) as diagnostics:
        loss = net(torch.ones(6, 3)).sum()
        loss.backward()
        diagnostics.record(loss.item())
    record = diagnostics.records[0]
    for picture in (
        plots.draw_activations(record),
        plots.draw_gradients(record),
        plots.draw_updates(diagnostics),
    ):
        ElementTree.fromstring(picture.svg)


def test_nothing_watched_is_nothing_to_draw(tmp_path):
    with pytest.raises(InputError, match="no step was watched"):
        plots.draw(Diagnostics(nn.Sequential(nn.Tanh())), tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def test_a_file_in_the_place_of_the_folder_is_left_alone(run, tmp_path):
    (tmp_path / "plots").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        plots.draw(run.diagnostics, tmp_path / "plots")
    assert (tmp_path / "plots").read_text() == "mine"


def test_the_page_holds_all_it_needs_and_nothing_of_it_is_markup(folder):
    text = (folder / "index.html").read_text()
    assert "<title>Title &lt;&amp;&gt;</title>" in text
    assert text.count("<img ") == text.count('src="data:image/svg+xml;base64,') == 7
    assert "<script" not in text
    assert "http://" not in re.sub(r"base64,[\w+/=]+", "", text)
    table = page.compose(
        "t", [page.Table(["a<b", "c"], [["<i>", "1"]], "<caption>"), page.Section("<h>", ["<p>"])]
    )
    assert not re.findall(r"<i>|<h>|<p><p>|a<b|<caption><", table)


def test_a_notebook_gets_every_picture_in_its_own_ink_and_no_style_for_anything_else(run):
    for picture in plots.draw_all(run.diagnostics, run.statistics):
        piece = picture._repr_html_()
        styles = "\n".join(re.findall(r"<style.*?>(.*?)</style>", piece, re.DOTALL))
        rules = re.findall(r"^(.+?) \{", styles, re.MULTILINE)
        assert {rule.partition(" ")[0] for rule in rules} == {".train.train"}
        assert piece.count("<svg") == 1
        assert "currentColor" in piece
        assert picture.caption in unescape(piece)


@needs_browser
def test_a_table_in_a_notebook_has_words_to_the_left_and_numbers_to_the_right(tmp_path):
    piece = page.Table(["a<b", "c", "d"], [["<i>", "1", "words"]], "<caption>", words=(2,))._repr_html_()
    assert "<i>" not in piece
    for place, side in ((1, "left"), (2, "right"), (3, "left")):
        assert style_in_jupyter(piece, tmp_path, f"td:nth-child({place})", "textAlign") == {side}


@needs_browser
def test_a_browser_shows_every_picture_in_both_colour_schemes_and_complains_of_nothing(folder, tmp_path):
    text = (folder / "index.html").read_text()
    probe = "<script>onload = () => { const i = [...document.images];"
    probe += "document.title = i.filter(e => e.complete && e.naturalWidth > 600).length + ' of ' + i.length"
    probe += "+ ' on ' + getComputedStyle(document.body).backgroundColor }</script></body>"
    probed = text.replace("</body>", probe).replace(
        "default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'"
    )
    (tmp_path / "probed.html").write_text(probed)
    for scheme, paper in ((1, "rgb(255, 255, 255)"), (0, "rgb(13, 17, 23)")):
        dom, log = browse(tmp_path / "probed.html", tmp_path, scheme, "--dump-dom")
        assert f"<title>7 of 7 on {paper}</title>" in dom
        assert "CONSOLE" not in log
    blocked = tmp_path / "blocked.html"
    blocked.write_text(text.replace("<h1>", "<img src='https://example.org/a.png'><h1>"))
    assert "CONSOLE" in browse(blocked, tmp_path, 1, "--dump-dom")[1]


@needs_browser
def test_ink_is_dark_on_light_and_light_on_dark(folder, tmp_path):
    for scheme, dark in ((1, False), (0, True)):
        shot = tmp_path / f"{scheme}.png"
        browse(folder / "index.html", tmp_path, scheme, f"--screenshot={shot}", "--window-size=1000,900")
        pixels = read_grey(shot)
        paper = np.median(pixels)
        assert (paper < 0.2) == dark
        picture = pixels[150:500, :480]
        assert (picture > 0.75).any() if dark else (picture < 0.35).any()


def read_grey(path):
    from matplotlib.image import imread

    return imread(path)[..., :3].mean(-1)


def test_the_same_numbers_are_written_for_tensorboard(run, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_events(run.diagnostics, tmp_path / "events")
    events = accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(run.diagnostics.losses, rel=1e-6)
    steps, ratios = run.diagnostics.updates()["2.weight"]
    found = events.Scalars("update/2.weight")
    assert ([e.step for e in found], [e.value for e in found]) == (steps, pytest.approx(ratios, rel=1e-6))
    histogram = events.Histograms("outputs/4")[0].histogram_value
    assert (histogram.num, sum(histogram.bucket)) == (320, 320)


def test_without_tensorboard_one_line_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        InputError, match="--tensorboard needs the package tensorboard; pip install tensorboard"
    ):
        write_events(run.diagnostics, tmp_path / "events")
    assert not (tmp_path / "events").exists()
