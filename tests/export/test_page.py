"""export.page: a folder that is all a browser needs, which invents the names that Python invents."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import bnfold
import export
import export.page
from bnfold.checkpoint import Checkpoint, load, save
from bnfold.errors import InputError
from export import sample
from export.page import runtime, write_page
from export.page.folded import tell_fold
from export.page.serve import open_server
from export.sample import Net, choose, invent
from tests.browser import needs_browser, readability
from tests.export.test_sample import save_net
from tests.tab import Tab, browsing

Serve = Callable[[Path], str]


@pytest.fixture(scope="session")
def written(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder, not to be changed, of `ckpt.pt` and of the `ckpt.onnx` that it became."""
    folder = tmp_path_factory.mktemp("written")
    (folder / "ckpt.pt").write_bytes(content)
    export.export(folder / "ckpt.pt")
    return folder


@pytest.fixture
def files(written: Path, tmp_path: Path) -> Path:
    """Return a folder of both files."""
    for path in written.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a home and a cache in which there is nothing, with a registry that nothing answers for."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BNFOLD_CACHE", str(tmp_path / "home" / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def without_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the runtime out of pages that no browser is to run."""
    monkeypatch.setattr(export.page, "fetch_runtime", lambda package: {})


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """Return a function that serves a folder until the end of these tests, and returns its address."""
    running = []

    def start(folder: Path) -> str:
        server = open_server(folder, 0)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browsing(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


def read_page(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


# -- the folder


@pytest.mark.usefixtures("without_runtime")
class TestFolder:
    def test_the_folder_holds_the_file_as_it_was_given(self, files: Path) -> None:
        assert write_page(files / "ckpt.onnx", files / "page") is None
        assert (files / "page" / "net.onnx").read_bytes() == (files / "ckpt.onnx").read_bytes()
        told = read_page(files / "page", "net.json")
        assert (told["length"], told["batch"], "".join(told["vocabulary"])) == (
            3,
            1,
            ".abcdefghijklmnopqrstuvwxyz",
        )

    def test_what_the_html_and_the_scripts_name_is_in_the_folder(self, files: Path) -> None:
        write_page(files / "ckpt.onnx", files / "page")
        there = {path.name for path in (files / "page").iterdir()} | set(runtime.RUNTIME)
        for name in ("page.css", "page.js", "draw.js", "fold.js", "net.json", "fold.json", "unfolded.onnx"):
            assert name in there
            assert any(
                name in (files / "page" / other).read_text()
                for other in there & {"index.html", "page.js", "fold.js"}
            )
        for name in runtime.RUNTIME:
            assert name in (files / "page" / "page.js").read_text()

    def test_a_page_takes_the_place_of_an_earlier_one_without_leaving_its_fold(self, files: Path) -> None:
        write_page(files / "ckpt.onnx", files / "page")
        (files / "ckpt.pt").unlink()
        assert "there is no ckpt.pt" in (write_page(files / "ckpt.onnx", files / "page") or "")
        assert not {"fold.json", "unfolded.onnx"} & {path.name for path in (files / "page").iterdir()}
        assert read_page(files / "page", "net.json")["fold"].startswith("there is no ckpt.pt")

    def test_a_folder_of_something_else_is_left_alone(self, files: Path) -> None:
        with pytest.raises(InputError, match="holds something else than a page"):
            write_page(files / "ckpt.onnx", files)
        assert {path.name for path in files.iterdir()} == {"ckpt.pt", "ckpt.onnx"}

    def test_a_file_is_no_folder(self, files: Path) -> None:
        with pytest.raises(InputError, match="is a file"):
            write_page(files / "ckpt.onnx", files / "ckpt.pt")

    def test_a_failure_leaves_an_earlier_page_as_it_was(
        self, files: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_page(files / "ckpt.onnx", files / "page")
        before = {path.name: path.read_bytes() for path in (files / "page").iterdir()}
        broken = Path(save_net(files / "other.onnx", [[0.0, 0.0, 0.0]] * 3))
        monkeypatch.setattr(export.page, "_ASSETS", ("index.html", "page.css", "absent.js"))
        with pytest.raises(FileNotFoundError):
            write_page(broken, files / "page")
        assert {path.name: path.read_bytes() for path in (files / "page").iterdir()} == before


# -- the numbers of the fold


class TestFold:
    def test_each_line_of_the_numbers_gives_the_same_output(self, files: Path) -> None:
        fold = tell_fold(files / "ckpt.onnx")
        layers = json.loads(fold.files["fold.json"])
        assert [(one["linear"], one["batchnorm"]) for one in layers] == [
            (f"linear{i}", f"bn{i}") for i in (1, 2, 3)
        ]
        session = onnxruntime.InferenceSession(fold.files["unfolded.onnx"])
        names = [output.name for output in session.get_outputs()]
        values = dict(zip(names, session.run(None, {"context": np.array([[0, 5, 13]])}), strict=True))
        for one in layers:
            n = {key: np.array(value) for key, value in one.items()}
            x, y = values[one["x"]][0], values[one["y"]][0]
            h = n["W"] @ x + n["b"]
            assert np.allclose(
                n["gamma"] * (h - n["mean"]) / np.sqrt(n["var"] + n["eps"]) + n["beta"], y, atol=1e-4
            )
            assert np.allclose(n["W2"] @ x + n["b2"], y, atol=1e-4)

    def test_numbers_are_those_of_the_file_to_the_bit(self, files: Path) -> None:
        first = json.loads(tell_fold(files / "ckpt.onnx").files["fold.json"])[0]
        stored = {
            one.name: onnx.numpy_helper.to_array(one)
            for one in onnx.load(files / "ckpt.onnx").graph.initializer
        }
        assert np.array_equal(np.float32(first["W2"]), stored["linear1.weight"])
        assert np.array_equal(np.float32(first["b2"]), stored["linear1.bias"])

    def test_a_file_made_of_a_folded_checkpoint_knows_the_one_before(self, files: Path) -> None:
        source = load(files / "ckpt.pt")
        folded, _ = bnfold.fold(source.model, source.input.sample(8))
        digest = sha256((files / "ckpt.pt").read_bytes()).hexdigest()
        record = {"source": digest, "verdicts": []}
        save(files / "ckpt.folded.pt", Checkpoint(folded, source.input, source.vocabulary, folded=record))
        export.export(files / "ckpt.folded.pt", files / "ckpt.onnx")
        assert tell_fold(files / "ckpt.onnx").missing is None

    def test_another_checkpoint_is_not_shown_as_the_source(
        self, files: Path, make_checkpoint: Callable[..., Checkpoint]
    ) -> None:
        save(files / "ckpt.pt", make_checkpoint(hidden=8))
        assert "is not the checkpoint" in str(tell_fold(files / "ckpt.onnx").missing)
        with pytest.raises(InputError, match="is not the checkpoint"):
            tell_fold(files / "ckpt.onnx", files / "ckpt.pt")
        with pytest.raises(InputError, match="no such file"):
            tell_fold(files / "ckpt.onnx", files / "other.pt")

    def test_a_net_without_batchnorms_has_no_fold(
        self, tmp_path: Path, make_checkpoint: Callable[..., Checkpoint]
    ) -> None:
        save(tmp_path / "ckpt.pt", make_checkpoint(batchnorm=False))
        export.export(tmp_path / "ckpt.pt")
        assert "no BatchNorm that was folded" in str(tell_fold(tmp_path / "ckpt.onnx").missing)

    def test_a_linear_that_absorbed_more_is_not_listed(
        self, tmp_path: Path, make_checkpoint: Callable[..., Checkpoint]
    ) -> None:
        plain = make_checkpoint()
        layers = dict(plain.model.named_children())
        layers = {
            "embedding": layers["embedding"],
            "flatten": layers["flatten"],
            "first": nn.BatchNorm1d(30),
        } | {name: layer for name, layer in layers.items() if name[-1] in "123"}
        layers["first"].running_mean.copy_(torch.arange(30) / 10)
        net = nn.Sequential()
        for name, layer in layers.items():
            net.add_module(name, layer)
        save(tmp_path / "ckpt.pt", Checkpoint(net.eval(), plain.input, plain.vocabulary))
        exported = export.export(tmp_path / "ckpt.pt")
        assert all(verdict.outcome == "folded" for verdict in exported.verdicts)
        told = json.loads(tell_fold(tmp_path / "ckpt.onnx").files["fold.json"])
        assert [one["batchnorm"] for one in told] == ["bn2", "bn3"]


# -- the runtime


class TestRuntime:
    def test_the_registry_is_npms_own_unless_the_user_says_otherwise(
        self, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert runtime.find_registry() == "https://registry.npmjs.org"
        (elsewhere / ".npmrc").write_text("fund=false\nregistry = 'https://mirror.invalid/npm/'\n")
        assert runtime.find_registry() == "https://mirror.invalid/npm"
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", "https://other.invalid/")
        assert runtime.find_registry() == "https://other.invalid"

    def test_a_package_that_is_another_is_refused(self, elsewhere: Path) -> None:
        (elsewhere / "other.tgz").write_bytes(b"something else")
        with pytest.raises(
            InputError, match=r"other\.tgz is not onnxruntime-web .* `npm pack onnxruntime-web@"
        ):
            runtime.fetch_runtime(elsewhere / "other.tgz")

    @pytest.mark.usefixtures("elsewhere")
    def test_what_a_registry_sends_is_used_only_if_it_is_what_was_pinned(
        self, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sent = tmp_path / "npm" / "onnxruntime-web" / "-" / f"onnxruntime-web-{runtime.VERSION}.tgz"
        sent.parent.mkdir(parents=True)
        sent.write_bytes(b"something else")
        monkeypatch.setenv("npm_config_registry", f"{serve(tmp_path)}npm/")
        runtime.locate_package().parent.mkdir(parents=True)
        runtime.locate_package().write_bytes(b"damaged")
        with pytest.raises(InputError, match=r"sent 14 bytes that are not onnxruntime-web"):
            runtime.fetch_runtime()
        assert runtime.locate_package().read_bytes() == b"damaged"

    def test_without_a_network_one_line_says_how_it_can_be_had(
        self, elsewhere: Path, files: Path, run_module: Callable[..., Any]
    ) -> None:
        result = run_module("export.page", "ckpt.onnx", npm_config_registry="http://127.0.0.1:1")
        assert result.returncode == 2
        assert "cannot be reached" in result.stderr
        assert "--runtime" in result.stderr
        assert not (files / "ckpt.page").exists()


# -- the server and the command


def test_the_server_says_what_each_file_is(serve: Serve, tmp_path: Path) -> None:
    wanted = {
        "a.html": "text/html",
        "a.css": "text/css",
        "a.js": "text/javascript",
        "a.mjs": "text/javascript",
    }
    wanted |= {
        "a.wasm": "application/wasm",
        "a.json": "application/json",
        "a.onnx": "application/octet-stream",
    }
    address = serve(tmp_path)
    for name, kind in wanted.items():
        (tmp_path / name).write_bytes(b"x")
        with urlopen(address + name) as reply:
            assert reply.headers.get_content_type() == kind


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with (
        open_server(tmp_path, 0) as first,
        pytest.raises(InputError, match=f"port {first.server_port} cannot"),
    ):
        open_server(tmp_path, first.server_port)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.onnx"], "absent.onnx: no such file"),
        (["ckpt.pt"], "ckpt.pt is no ONNX model"),
        (["ckpt.onnx", "--port", "70000"], "--port 70000"),
        (["ckpt.onnx", "--runtime", "absent.tgz"], "absent.tgz: No such file"),
        (["ckpt.onnx", "--checkpoint", "absent.pt"], "absent.pt: no such file"),
    ],
)
@pytest.mark.usefixtures("files")
def test_what_cannot_be_used_is_one_line(
    arguments: list[str], message: str, run_module: Callable[..., Any]
) -> None:
    result = run_module("export.page", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {message}")
    assert len(result.stderr.splitlines()) == 1


# -- draw.js, without a runtime


@pytest.fixture
def scripts(tab: Tab, serve: Serve) -> Tab:
    """Return a tab that can import the scripts of the page."""
    tab.open(serve(Path(export.page.__file__).parent) + "page.css")
    tab.wait("document.body?.innerText.includes('root')")
    return tab


@needs_browser
def test_uniform_numbers_in_the_browser_are_those_of_numpy(scripts: Tab) -> None:
    pairs = [(seed, attempt) for seed in (0, 1, 2**32, 2**32 - 1, 10**39) for attempt in (0, 7, 1999)]
    given = json.dumps([[str(one) for one in pair] for pair in pairs])
    script = f"{given}.map(pair => draw.uniform(pair.map(BigInt), 31))"
    drawn = scripts.ask(f"import('./draw.js').then(draw => {script})")
    assert drawn == [np.random.default_rng(pair).random(31).tolist() for pair in pairs]


@needs_browser
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("start", ["", "ab"])
def test_names_of_one_table_are_those_of_python(batch: int, start: str, scripts: Tab, tmp_path: Path) -> None:
    rows = [[-1.0, 0.5, 0.25], [0.5, -0.5, 1.0], [0.125, 0.75, -2.0]]
    net = Net(save_net(tmp_path / "net.onnx", rows, batch=batch))
    wanted = list(invent(net, 40, 5, 1.5, 6, start))
    assert len(wanted) > 15
    indices = json.dumps(["ab".index(one) + 1 for one in start])
    names = scripts.ask(f"""import('./draw.js').then(async draw => {{
      const rows = {rows}, net = {{ length: 2, batch: {batch}, vocabulary: [".", "a", "b"] }}, names = [];
      net.run = async contexts => contexts.map(context => rows[context[1]]);
      const wish = {{ count: 40, seed: 5n, temperature: 1.5, longest: 6, start: {indices} }};
      for await (const name of draw.invent(net, wish)) names.push(name);
      return names;
    }})""")
    assert names == wanted


# -- the page, with onnxruntime-web


@pytest.fixture(scope="session")
def needs_runtime() -> None:
    """Have the package in the cache; without it there is nothing to run."""
    try:
        runtime.fetch_runtime()
    except InputError as error:
        pytest.skip(f"onnxruntime-web cannot be had: {error}")


@pytest.fixture(scope="module")
def page(needs_runtime: None, written: Path, tmp_path_factory: pytest.TempPathFactory, serve: Serve) -> str:
    """Return the address of a page, with its fold."""
    folder = tmp_path_factory.mktemp("page")
    write_page(written / "ckpt.onnx", folder)
    return serve(folder)


def shown(tab: Tab, start: str = "") -> list[str]:
    """The names on the page, once they are those that begin so."""
    tab.wait(
        "document.querySelector('#names').getAttribute('aria-busy') === 'false' && "
        f"[...document.querySelectorAll('#names mark')].every(one => one.textContent === {start!r})"
    )
    return tab.ask("[...document.querySelectorAll('#names li')].map(one => one.textContent)")


def text(tab: Tab, name: str) -> str:
    return tab.ask(f"document.getElementById({name!r}).textContent")


def put(tab: Tab, name: str, value: object) -> None:
    """Let a control have a value as if somebody had given it."""
    tab.ask(
        f"(one => {{ one.value = {str(value)!r}; one.dispatchEvent(new Event('input')); "
        f"document.getElementById('names').setAttribute('aria-busy', 'true') }})(document.getElementById({name!r}))"
    )


COLOURS = """[...document.querySelectorAll("body *")].filter(one => one.checkVisibility() && !one.disabled
  && [...one.childNodes].some(child => child.nodeType === 3 && child.data.trim())).map(one => {
    const layers = [];
    for (let each = one; each; each = each.parentElement) {
      const below = getComputedStyle(each);
      layers.push([below.backgroundColor, below.opacity]);
    }
    return [getComputedStyle(one).color, layers, one.textContent];
  })"""


@pytest.mark.slow
@needs_browser
@pytest.mark.usefixtures("needs_runtime")
class TestInChromium:
    @pytest.mark.parametrize("batch", [1, 5, "dynamic"])
    def test_names_are_those_of_python_and_nothing_is_complained_of(
        self, batch: int | str, ckpt: Path, serve: Serve, tab: Tab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, folder = ckpt.with_name("ckpt.onnx"), ckpt.parent / "page"
        export.export(ckpt, model, batch)
        write_page(model, folder)
        tab.complaints, tab.asked = [], []
        address, nearest = serve(folder), []

        def measured(logits: Any, chances: Any, temperature: float) -> Any:
            sums = np.cumsum(np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature), axis=1)
            nearest.append(np.abs((sums / sums[:, -1:])[:, :-1] - chances[:, None]).min())
            return choose(logits, chances, temperature)

        monkeypatch.setattr(sample, "choose", measured)
        tab.open(address)
        tab.wait("document.querySelector('#names li')")
        for seed, start in ((1, ""), (2, ""), (1, "mar")):
            put(tab, "seed", seed)
            put(tab, "start", start)
            assert shown(tab, start) == list(invent(Net(str(model)), 20, seed, start=start))
        assert min(nearest) > 1e-6, (
            "a draw falls so near to a boundary that float32 may decide it; take another seed"
        )
        assert tab.complaints == []
        assert all(url.startswith(address) for url in tab.asked)

    def test_bars_are_the_probabilities_of_the_next_character(self, page: str, files: Path, tab: Tab) -> None:
        tab.open(page)
        tab.wait("document.querySelector('#names li')")
        put(tab, "start", "xe")
        shown(tab, "xe")
        logits = Net(str(files / "ckpt.onnx"))(np.array([[0, 24, 5]]))[0]
        wanted = np.exp(logits - logits.max())
        wanted /= wanted.sum()
        told = tab.ask("[...document.querySelectorAll('#odds span')].map(one => parseFloat(one.textContent))")
        assert np.allclose(told, 100 * wanted, atol=0.051)
        widths = tab.ask(
            "[...document.querySelectorAll('#odds i')].map(one => one.style.getPropertyValue('--share'))"
        )
        assert np.allclose(np.array(widths, float), wanted / wanted.max(), atol=1e-4)

    def test_all_of_it_can_be_done_with_the_keyboard(self, page: str, tab: Tab) -> None:
        tab.open(page)
        tab.wait("document.querySelector('#names li')")
        tab.press("Tab")
        tab.type("ma")
        assert text(tab, "context") == ".ma"
        tab.press("Tab", "Tab", "Enter")
        assert tab.ask("document.getElementById('start').value") == "mab"
        reached = []
        while "step" not in reached:
            tab.press("Tab")
            reached.append(tab.ask("document.activeElement.id"))
            assert len(reached) < 60, reached
        assert {"seed", "other", "temperature", "layer", "neuron"} <= set(reached)
        titles = [text(tab, "title")]
        for _ in range(4):
            tab.press("ArrowRight")
            titles.append(text(tab, "title"))
        assert [title[:6] for title in titles] == [f"Step {step}" for step in range(5)]

    @pytest.mark.parametrize("layer", [0, 1, 2])
    def test_the_output_of_a_neuron_stays_what_it_is_at_every_step(
        self, layer: int, page: str, files: Path, tab: Tab
    ) -> None:
        tab.open(page)
        tab.wait("document.querySelector('#names li')")
        put(tab, "layer", layer)
        put(tab, "neuron", 11)
        told = tell_fold(files / "ckpt.onnx").files
        session = onnxruntime.InferenceSession(told["unfolded.onnx"])
        y = session.run([json.loads(told["fold.json"])[layer]["y"]], {"context": np.zeros((1, 3), np.int64)})[
            0
        ]
        numbers = []
        for step in range(5):
            put(tab, "step", step)
            outputs = [text(tab, name).replace("\u2212", "-") for name in ("before", "after", "apart")]
            before, after, apart = map(float, outputs)
            assert np.allclose([before, after], y[0, 11], atol=1e-4)
            assert apart < (1e-12 if step < 4 else 1e-4)
            numbers.append(tab.ask("document.querySelectorAll('#numbers div').length"))
        assert numbers == [6, 4, 4, 1, 1]

    def test_what_the_net_does_not_know_is_said_and_mended_by_typing_on(self, page: str, tab: Tab) -> None:
        tab.open(page)
        tab.wait("document.querySelector('#names li')")
        tab.press("Tab")
        tab.type("a!")
        assert "does not know “!”" in text(tab, "wrong")
        put(tab, "start", "an")
        assert all(name.startswith("an") for name in shown(tab, "an"))
        assert text(tab, "wrong") == ""

    def test_without_its_checkpoint_a_page_says_that_the_fold_is_not_shown(
        self, files: Path, serve: Serve, tab: Tab
    ) -> None:
        (files / "ckpt.pt").unlink()
        write_page(files / "ckpt.onnx", files / "page")
        tab.complaints = []
        tab.open(serve(files / "page"))
        assert len(shown(tab)) == 20
        assert text(tab, "unfolded") == "The fold is not shown: there is no ckpt.pt beside ckpt.onnx."
        assert not tab.ask("document.getElementById('fold').checkVisibility()")
        assert tab.complaints == []

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", [360, 390, 1100])
    def test_it_fits_the_window_and_can_be_read(self, scheme: str, width: int, page: str, tab: Tab) -> None:
        tab.open(page, width, scheme)
        tab.wait("document.querySelector('#names li')")
        shown(tab)
        assert tab.ask("document.documentElement.scrollWidth") <= width
        assert tab.ask("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
        put(tab, "step", 4)
        shown_texts = tab.ask(COLOURS)
        assert len(shown_texts) > 80
        for colour, layers, what in shown_texts:
            assert readability(colour, layers) >= 4.5, (what, colour)

    def test_every_control_has_a_name(self, page: str, tab: Tab) -> None:
        tab.open(page)
        tab.wait("document.querySelector('#names li')")
        tree = tab.send("Accessibility.getFullAXTree")["nodes"]
        roles = {"button", "textbox", "slider", "combobox", "spinbutton", "link"}
        controls = [node for node in tree if node.get("role", {}).get("value") in roles]
        assert len(controls) > 33
        assert all(node["name"]["value"].strip() for node in controls), controls
