"""Every reader of a file, attacked: damaged files by the thousand, each given to the command as a user would.

A target is a sound file, a way to damage it and the command that reads it. Of each damaged file it is asked that the
command ends with exit code 0, 1 or 2 and, where not 0, one line on stderr; that no process was started, no connection
made and no file written or removed but the output; that an older output survives a failure; that it took less than
`MEMORY` more memory and `PATIENCE` seconds.

The files are read in a process of its own (`survive`), which notes the seed before it begins, so that a crash of the
interpreter names its seed like any other finding. What it would start is stopped by an audit hook. Not covered: a
file that changes while it is read; what native code does behind Python's back, short of a crash.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import io
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import onnxruntime  # noqa: F401 imported once, before the processes that read are forked
import torch
from torch import nn

from bnfold import checkpoint
from tests.fuzz import mutants
from tests.fuzz.mutants import Mutator, archive, blind

MEMORY = 2 << 30
PATIENCE = 100

PROCESSES = multiprocessing.get_context("forkserver")
LAZY = (
    "torch._dynamo",
    "torch._inductor.codecache",
    "torch.onnx",
    "onnx.reference.ops",
    "rich.table",
    "data.__main__",
)
PROCESSES.set_forkserver_preload(["tests.fuzz.readers", *LAZY])


# ---------------------------------------------------------------- sound files


class Net(nn.Module):
    """A convolution and its BatchNorm: what the weights and the program are of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn(self.conv(x)))


def net() -> nn.Module:
    """What `--model` names."""
    torch.manual_seed(0)
    return Net().eval()


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _payload() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3))
    saved = checkpoint.Checkpoint(
        model.eval(),
        checkpoint.InputDomain((2,), "int64", 0, 5),
        tuple(".abcd"),
        {"seed": 1, "losses": [2.5]},
    )
    return checkpoint._pack(saved)


def _program() -> bytes:
    buffer = io.BytesIO()
    sizes = ({0: torch.export.Dim("batch")},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(net(), (torch.ones(2, 2, 5, 5),), dynamic_shapes=sizes), buffer)
    return buffer.getvalue()


def _safetensors() -> bytes:
    from safetensors.torch import save

    return save(net().state_dict(), {"format": "pt"})


GRAPH = """
<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
g (float[N, 2, 5, 5] x, bool yes) => (float[N, 3, H, W] y, float[N, 3] z) {
    two = Constant <value = int64[2] {2, 3}> ()
    c = Conv <kernel_shape = [3, 3], pads = [0, 0, 1, 1]> (x, w, o)
    b = BatchNormalization <epsilon = 0.01> (c, s, o, o, s)
    r = If (yes) <
        then_branch = t () => (float[N, 3, H, W] p) { p = Relu(b) },
        else_branch = e () => (float[N, 3, H, W] q) { q = Abs(b) }
    >
    y = local.twice (r)
    m = ReduceMean <axes = [2, 3], keepdims = 0> (b)
    g = Gemm <transB = 1> (m, k, o)
    z = BatchNormalization (g, s, o, o, s)
}
<domain: "local", opset_import: ["" : 17]>
twice (a) => (d) { d = Add(a, a) }
"""


def _model() -> onnx.ModelProto:
    model = onnx.parser.parse_model(GRAPH)
    random = np.random.default_rng(0)
    for name, shape in {"w": (3, 2, 3, 3), "k": (3, 3), "s": (3,), "o": (3,)}.items():
        array = (random.random(shape) + 0.5).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def _graph() -> bytes:
    return _model().SerializeToString()


@functools.cache
def _external() -> Mapping[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.onnx"
        onnx.save_model(_model(), path, save_as_external_data=True, location="in.data", size_threshold=0)
        return {name: (Path(folder) / name).read_bytes() for name in ("in.onnx", "in.data")}


def _arrays() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.ones((2, 2, 5, 5), np.float32), yes=np.array(True))
    return buffer.getvalue()


def _names() -> bytes:
    return "\n".join(["emma", "olivia", "zoë", "", "  ava ", "isabella", "søren", "mia", "amélie"]).encode()


# ---------------------------------------------------------------- how each is damaged


def _odd_tensor(random: Random) -> torch.Tensor:
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64)
    shape = random.choice(((), (0,), (3,), (3, 4), (1,) * 9, (2, 2, 2)))
    return random.choice((
        torch.ones(shape, dtype=random.choice(kinds)),
        torch.full(shape, random.choice((float("nan"), float("inf"), 1e38))),
        torch.ones(1).expand(random.choice((3, 2**20))),
        torch.empty(shape, device="meta"),
        torch.ones(3, 4).to_sparse(),
    ))  # fmt: skip


def _saved_again(payload: Callable[[], Any]) -> Mutator:
    """Damage what was saved instead of the file: every value a plain one may not be."""

    def mutate(data: bytes, random: Random) -> bytes:
        odd = (*mutants.ODD, _odd_tensor)
        return _saved(mutants.tree(payload(), random, odd))

    return mutate


def _torch_archive(payload: Callable[[], Any]) -> Mutator:
    again = _saved_again(payload)

    def mutate(data: bytes, random: Random) -> bytes:
        kind = random.random()
        if kind < 0.1:
            return blind(data, random)
        return again(data, random) if kind < 0.6 else archive(data, random, {".pkl": mutants.pickled})

    return mutate


def _program_archive(data: bytes, random: Random) -> bytes:
    inside = {".json": mutants.as_json, ".pt": lambda pt, r: archive(pt, r, {".pkl": mutants.pickled})}
    return blind(data, random) if random.random() < 0.05 else archive(data, random, inside)


def _npz(data: bytes, random: Random) -> bytes:
    return blind(data, random) if random.random() < 0.1 else archive(data, random, {".npy": mutants.npy})


def _onnx(data: bytes, random: Random) -> bytes:
    return blind(data, random) if random.random() < 0.15 else mutants.protobuf(data, random)


def _entries(data: bytes, random: Random) -> bytes:
    """Change where a model says that its tensors lie: location, offset, length, and which tensors do."""
    if random.random() < 0.4:
        return _onnx(data, random)
    model = onnx.ModelProto.FromString(data)
    for _ in range(random.choice((1, 1, 2))):
        tensor = random.choice(model.graph.initializer)
        entry = random.choice(tensor.external_data)
        odd = random.choice(
            (*mutants.WORDS, *mutants.NUMBERS, -1, "1e3", "in.onnx", "/etc/passwd", "in.data/x", ".")
        )
        setattr(entry, random.choice(("key", "value", "value")), str(odd).encode("utf-8", "replace").decode())
        if random.random() < 0.2:
            tensor.data_type = random.randrange(24)
        if random.random() < 0.2:
            tensor.dims[0] = random.choice((-1, 0, 2**31, 2**62, 4))
    return model.SerializeToString()


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        sound: the files before the damage, by name; a function, since some take seconds to make.
        damaged: which of them is damaged, and how.
        command: what reads it, in a folder with all of them: a module's `main` and its arguments.
        share: how many in a thousand of all mutants are its own, by what one costs.
    """

    sound: Callable[[], Mapping[str, bytes]]
    damaged: tuple[tuple[str, Mutator], ...]
    command: tuple[str, ...]
    share: int


FOLD = "bnfold.fold"
MODEL = ("--model", "tests.fuzz.readers:net", "--input", "2x2x5x5")


def _one(name: str, make: Callable[[], bytes], *mutators: Mutator) -> Any:
    return functools.cache(lambda: {name: make()}), tuple((name, mutator) for mutator in mutators)


def _weights() -> dict[str, Any]:
    return {"state_dict": dict(net().state_dict()), "epoch": 3, "args": {"lr": 0.1}}


def _npz_files() -> Mapping[str, bytes]:
    return {"in.onnx": _graph(), "in.npz": _arrays()}


TARGETS = {
    "checkpoint": Target(
        *_one("in.pt", lambda: _saved(_payload()), _torch_archive(_payload)), (FOLD, "in.pt"), 200
    ),
    "state dict": Target(
        *_one("in.pth", lambda: _saved(_weights()), _torch_archive(_weights)), (FOLD, "in.pth", *MODEL), 150
    ),
    "safetensors": Target(
        *_one("in.safetensors", _safetensors, mutants.safetensors), (FOLD, "in.safetensors", *MODEL), 150
    ),
    "program": Target(*_one("in.pt2", _program, _program_archive), (FOLD, "in.pt2"), 20),
    "onnx": Target(*_one("in.onnx", _graph, _onnx), (FOLD, "in.onnx"), 200),
    "external data": Target(_external, (("in.onnx", _entries), ("in.data", blind)), (FOLD, "in.onnx"), 100),
    "arrays": Target(functools.cache(_npz_files), (("in.npz", _npz),), (FOLD, "in.onnx", "--inputs", "in.npz"), 80),
    "names": Target(*_one("in.txt", _names, mutants.text), ("data.__main__", "show", "--names", "in.txt"), 100),
}  # fmt: skip


def share(target: str, total: int) -> range:
    """The seeds of a target, of `total` for all of them."""
    return range(total * TARGETS[target].share // 1_000)


def damage(target: str, seed: int, sound: Mapping[str, bytes] | None = None) -> dict[str, bytes]:
    """The files of a target, one of them damaged."""
    files = dict(TARGETS[target].sound() if sound is None else sound)
    random = Random(f"{target} {seed}")
    name, mutate = random.choice(TARGETS[target].damaged)
    return files | {name: mutate(files[name], random)}


# ---------------------------------------------------------------- reading in a process of its own


def survive(target: str, seeds: range, folder: Path, command: tuple[str, ...] = ()) -> list[str]:
    """Have every damaged file read, by another command if one is given, and return what was found, with its seed."""
    command = command or TARGETS[target].command
    folder.mkdir(exist_ok=True)
    journal, sound, found = folder / "journal", TARGETS[target].sound(), []
    while seeds:
        journal.write_text("")
        shutil.rmtree(folder / "place", ignore_errors=True)
        process = PROCESSES.Process(target=_attack, args=(target, seeds, sound, folder, command))
        process.start()
        process.join()
        notes = [json.loads(line) for line in journal.read_text().splitlines()]
        found += [f"{target} {note['seed']}: {note['found']}" for note in notes if "found" in note]
        if process.exitcode == 0:
            break
        last = max((note["seed"] for note in notes), default=seeds.start)
        found.append(f"{target} {last}: the process ended ({process.exitcode}): {_last_words(folder)}")
        seeds = range(last + 1, seeds.stop)
    return found


def _last_words(folder: Path) -> str:
    """What faulthandler had to say: the error, and where Python was."""
    lines = (folder / "stderr").read_text("utf-8", "replace").splitlines()
    told = [line.strip() for line in lines if "error" in line.lower() or line.startswith("  File")]
    return " | ".join(told[:3])[:300]


def _attack(
    target: str, seeds: range, sound: Mapping[str, bytes], folder: Path, command: tuple[str, ...]
) -> None:
    """In a process of its own: read the damaged files of these seeds, and note what was found."""
    shield = Shield(folder)
    with (folder / "journal").open("a", buffering=1) as journal:
        for seed in seeds:
            print(json.dumps({"seed": seed}), file=journal)
            faulthandler.dump_traceback_later(PATIENCE, exit=True, file=shield.log)
            for complaint in examine(command, damage(target, seed, sound), folder / "place", shield):
                print(json.dumps({"seed": seed, "found": complaint}), file=journal)
            shutil.rmtree(folder / "place")
    faulthandler.cancel_dump_traceback_later()


class Shield:
    """Bounds this process's memory, catches what it prints, and stops what it would start; not to be undone."""

    STARTS = (
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
        "os.spawn",
        "subprocess.Popen",
        "socket.connect",
    )
    CHANGES = (
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.mkdir",
        "os.truncate",
        "os.chmod",
        "os.link",
        "os.symlink",
    )

    def __init__(self, folder: Path) -> None:
        self.log = (folder / "stderr").open("w+b", buffering=0)
        scratch = Path(tempfile.gettempdir())
        self.folders = tuple(
            map(str, (folder, folder.resolve(), scratch / "bnfold-", scratch / "torchinductor_"))
        )
        self.caught: list[str] = []
        self.armed = False
        faulthandler.enable(self.log)
        os.dup2(self.log.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if sys.platform == "linux":
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event in self.STARTS:
            self.caught.append(f"{event} {arguments!r:.80}")
            raise PermissionError(f"{event} is not for a reader")
        if event in self.CHANGES or (event == "open" and self._writes(arguments[2])):
            path = arguments[0]
            if isinstance(path, str | bytes | os.PathLike) and not self._is_inside(os.fsdecode(path)):
                self.caught.append(f"{event} {path!r}")

    @staticmethod
    def _writes(flags: Any) -> bool:
        return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

    def _is_inside(self, path: str) -> bool:
        known = (*self.folders, os.devnull, str(sys.pycache_prefix or "\0"))
        return os.path.abspath(path).startswith(known) or "__pycache__" in path  # noqa: PTH100 resolves no link

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        self.log.seek(0)
        self.log.truncate()
        self.caught.clear()
        self.armed = True
        try:
            yield
        finally:
            self.armed = False

    def printed(self) -> list[str]:
        self.log.seek(0)
        return self.log.read().decode("utf-8", "replace").splitlines()


def examine(
    command: tuple[str, ...], files: Mapping[str, bytes], place: Path, shield: Shield
) -> Iterator[str]:
    """Run a command on the files of a target and yield every way in which it did what no file may make it do."""
    place.mkdir()
    for name, content in files.items():
        (place / name).write_bytes(content)
    module, first, *rest = command
    output = f"out{Path(first).suffix}"
    arguments = [first, *rest, *(("-o", output) if module == FOLD else ())]
    (place / output).write_bytes(b"old")
    before = os.getcwd()  # noqa: PTH109
    os.chdir(place)
    code: Any = None
    try:
        with shield.raised():
            code = _run(module, arguments)
    except Exception as error:  # noqa: BLE001 whatever comes out is the finding
        where = traceback.extract_tb(error.__traceback__)[-1]
        yield f"{type(error).__name__}: {error!s:.150} ({Path(where.filename).name}:{where.lineno})"
    finally:
        os.chdir(before)
    yield from shield.caught
    lines = shield.printed()
    if code is not None:
        yield from _judge_exit(code, lines)
    yield from _judge_files(files, place, output, code)


def _run(module: str, arguments: list[str]) -> int:
    import importlib

    try:
        return int(importlib.import_module(module).main(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)


def _judge_exit(code: int, lines: list[str]) -> Iterator[str]:
    if code not in (0, 1, 2):
        yield f"exit code {code}"
    if code and not (len(lines) == 1 and "error: " in lines[0]):
        yield f"exit code {code} with {len(lines)} lines on stderr: {' | '.join(lines):.200}"
    if not code and lines:
        yield f"exit code 0 with {len(lines)} lines on stderr: {' | '.join(lines):.200}"


def _judge_files(files: Mapping[str, bytes], place: Path, output: str, code: int | None) -> Iterator[str]:
    found = {path.relative_to(place).as_posix(): path for path in place.rglob("*")}
    for name, content in files.items():
        if name not in found or found[name].read_bytes() != content:
            yield f"{name} was changed or removed"
    if code != 0 and (output not in found or found[output].read_bytes() != b"old"):
        yield f"the older output did not survive exit code {code}"
    odd = [name for name in found if name not in files and not name.startswith("out")]
    if odd:
        yield f"it left {', '.join(odd)}"
