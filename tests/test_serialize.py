import copy
import hashlib
import json
import os
import random
import subprocess
import sys
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from networks import call
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fastq
from fastq.encode import VERSION
from fastq.layout import Ref, encode_value
from fastq.nn import QConv2d, QLinear
from fastq.nn.model import NAMED, _read_spec, spec_text
from fastq.serialize import load, save
from fastq.summaries import summary
from fastq.swap import quantize_layers


class Padded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Net(nn.Module):
    """Everything that a file has to carry: folded and unfolded batch norm, a rebuilt layer,
    a layer with two names, tied parameters, float layers, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.same = Padded(8, 8, 3, padding="same", dilation=2, groups=2)
        self.last = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 8)
        self.alias = self.fc
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.randn(8))
        self.tied = self.scale
        self.register_buffer("mean", torch.randn(1, 1, 2, 3)[..., 1:2])
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x - self.mean.mean()))
        x = self.last(F.relu(self.same(F.relu(x)))).mean((2, 3))
        return self.alias(self.norm(F.relu(self.fc(x)))) * self.scale * self.tied


def images() -> Tensor:
    return torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(7))


def quantized(data: Tensor | None) -> nn.Module:
    model = Net()
    model(images())  # in training mode: running statistics
    return quantize_layers(model, data)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "net.fastq"
    save(quantized(images()), path)
    return path.read_bytes()


@pytest.fixture
def path(saved: bytes, tmp_path: Path) -> Path:
    (tmp_path / "net.fastq").write_bytes(saved)
    return tmp_path / "net.fastq"


@pytest.mark.parametrize("data", [images(), None], ids=["static", "dynamic"])
def test_a_loaded_model_gives_the_same_bits(data: Tensor | None, tmp_path: Path) -> None:
    model, x = quantized(data), images()
    save(model, tmp_path / "net")
    given = Net().train()
    before = copy.deepcopy(given.state_dict())
    got = load(tmp_path / "net", given)
    assert torch.equal(got(x), model(x))
    assert type(got) is Net and not got.training
    assert not any(p.requires_grad for p in got.parameters())
    assert isinstance(got.fc, QLinear) and got.alias is got.fc
    assert isinstance(got.same, QConv2d) and got.tied is got.scale
    assert got.fc.input_qparams == model.fc.input_qparams
    assert summary(got) == summary(model)
    assert given.training and type(given.fc) is nn.Linear
    assert all(torch.equal(before[name], value) for name, value in given.state_dict().items())


def test_a_loaded_model_can_be_saved_again(path: Path, tmp_path: Path) -> None:
    save(load(path, Net()), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_string_is_a_path(tmp_path: Path) -> None:
    model = quantize_layers(nn.Linear(3, 2))
    save(model, str(tmp_path / "one"))
    x = torch.randn(4, 3)
    assert torch.equal(load(str(tmp_path / "one"), nn.Linear(3, 2))(x), model(x))


def test_layers_that_were_swapped_by_hand_can_be_saved(tmp_path: Path) -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

    model = net()
    model[0] = QLinear.from_float(model[0])
    save(model, tmp_path / "net")
    got, x = load(tmp_path / "net", net()), torch.randn(4, 3)
    assert torch.equal(got(x), model(x)) and summary(got).rows == ()


def test_tied_tensors_are_in_the_file_once(path: Path) -> None:
    with safetensors.safe_open(path, "pt") as file:
        names = set(file.keys())
    assert "fc.weight" in names and not names & {"alias.weight", "tied", "scratch"}


def test_other_dtypes_keep_their_bits(tmp_path: Path) -> None:
    def net() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3))
        for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.complex64):
            name = str(dtype).removeprefix("torch.")
            model.register_buffer(f"a_{name}", torch.randn(3).to(dtype))
        model.register_buffer("empty", torch.zeros(0, 3))
        return model

    model = quantize_layers(net())
    save(model, tmp_path / "net")
    state = load(tmp_path / "net", net()).state_dict()
    for name, value in model.state_dict().items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value)


# --- saving


def test_what_is_around_a_network_is_refused(tmp_path: Path) -> None:
    int8 = fastq.quantize_model(nn.Sequential(nn.Conv2d(3, 4, 3)), images(), progress=False)
    with pytest.raises(
        ValueError, match=r"wanted that one: fastq.save\(model.get_submodule\('0'\)"
    ):
        save(nn.Sequential(int8, nn.Softmax(1)), tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_a_float_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no int8 layer"):
        save(Net(), tmp_path / "net")
    with pytest.raises(TypeError, match="the model, then the path"):
        save(tmp_path / "net", quantized(None))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"a": 1}

    model = quantize_layers(nn.Sequential(nn.Linear(2, 2), Extra(2, 2)), skip="1")
    with pytest.raises(ValueError, match=r"'1\._extra_state', a dict"):
        save(model, tmp_path / "net")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_no_other(
    call: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = path.read_bytes()

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="disk full"):
        save(quantized(None), path)
    assert path.read_bytes() == old and list(path.parent.iterdir()) == [path]


def test_an_old_file_is_replaced_and_a_link_is_followed(path: Path) -> None:
    link = path.with_name("link")
    link.symlink_to(path)
    model = quantized(None)
    save(model, link)
    assert link.is_symlink()
    assert torch.equal(load(path, Net())(images()), model(images()))


def test_the_mode_of_an_old_file_is_kept(path: Path) -> None:
    path.chmod(0o600)
    save(quantized(None), path)
    assert path.stat().st_mode & 0o777 == 0o600
    new = path.with_name("new")
    save(quantized(None), new)
    plain = path.with_name("plain")
    plain.touch()
    assert new.stat().st_mode == plain.stat().st_mode


def test_what_is_no_regular_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipe, folder, link = tmp_path / "pipe", tmp_path / "folder", tmp_path / "link"
    os.mkfifo(pipe)
    folder.mkdir()
    link.symlink_to(pipe)
    for given, error in (
        (pipe, FileExistsError), (link, FileExistsError), (folder, IsADirectoryError),
        ("", IsADirectoryError),
    ):  # fmt: skip
        with pytest.raises(error, match="no regular file; wanted the name of a file") as caught:
            save(quantized(None), given)
        assert caught.value.filename == str(given)
    assert pipe.is_fifo() and sorted(tmp_path.iterdir()) == [folder, link, pipe]


def test_a_name_may_be_as_long_as_the_system_takes(tmp_path: Path) -> None:
    save(quantized(None), tmp_path / ("n" * 255))
    assert [len(path.name) for path in tmp_path.iterdir()] == [255]


def test_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    path = tmp_path / "no" / "net"
    with pytest.raises(FileNotFoundError) as caught:
        save(quantized(None), path)
    assert caught.value.filename == str(path) and f"no folder {path.parent};" in str(caught.value)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "no", Net())


# --- damaged and foreign files


DAMAGE = "altered|truncated|without fastq's header|not JSON|another format|version"


def test_a_file_cut_anywhere_is_refused(path: Path) -> None:
    data = path.read_bytes()
    for size in [*range(0, 200, 7), *range(200, len(data), 501), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="truncated"):
            load(path, Net())


def test_a_file_altered_anywhere_is_refused(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for position in [*range(0, 3000, 37), *range(3000, len(data), 199), len(data) - 1]:
        data[position] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match=DAMAGE):
            load(path, Net())
        data[position] ^= 1


def test_bytes_at_the_end_are_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="truncated"):
        load(path, Net())


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 64, b"PK\3\4" + bytes(99)])
def test_what_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="no safetensors file"):
        load(tmp_path / "x", Net())


def test_metadata_that_is_null_is_refused(tmp_path: Path) -> None:
    header = b'{"__metadata__":null}'
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="without fastq's header"):
        load(tmp_path / "x", Net())


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_foreign_safetensors_file_is_refused(metadata: Any, tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "x", metadata)
    with pytest.raises(ValueError, match="without fastq's header"):
        load(tmp_path / "x", Net())


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> None:
    """Change header and tensors, and give the file the digest that belongs to it."""
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["fastq"])
        header.pop("sha256")
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    text = change(header, tensors)
    if not isinstance(text, str):
        digest = hashlib.sha256(json.dumps(header).encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        text = json.dumps({**header, "sha256": digest.hexdigest()})
    safetensors.torch.save_file(tensors, path, {"fastq": text})


def test_rewriting_nothing_loads(path: Path) -> None:
    wanted = load(path, Net())(images())
    rewrite(path, lambda header, tensors: None)
    assert torch.equal(load(path, Net())(images()), wanted)


HOSTILE_HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "not JSON": (lambda h: "{", "not JSON"),
    "deep": (lambda h: "[" * 200_000, "not JSON"),
    "deep within": (lambda h: '{"x":' + "[" * 980 + "]" * 980 + "}", "not JSON|another format"),
    "a list": (lambda h: "[]", "another format"),
    "format": (lambda h: h.update(format="other"), "another format"),
    "newer": (
        lambda h: h.update(version=VERSION + 1),
        f"version {VERSION + 1}, this fastq reads {VERSION}",
    ),
    "no version": (lambda h: [h.pop("version")], "version None"),
    "version text": (lambda h: h.update(version="1"), "version '1'"),
    "no layers": (lambda h: h.pop("layers"), "layers is None, wanted dict"),
    "layers list": (lambda h: h.update(layers=[1]), "wanted dict"),
    "folded text": (lambda h: h.update(folded="bn"), "wanted list"),
    "folded numbers": (lambda h: h.update(folded=[[]]), "names as strings"),
    "tied numbers": (lambda h: h.update(tied={"tied": 3}), "names as strings"),
    "tied nowhere": (lambda h: h["tied"].update(tied="nowhere"), "nowhere"),
    "summary numbers": (lambda h: h.update(summary=[3]), "summary has 3"),
    "summary result": (lambda h: h["summary"][0].__setitem__(2, "int4"), "summary has"),
    "layer number": (lambda h: h["layers"].update(fc=3), "layer 'fc' is 3"),
    "type list": (lambda h: h["layers"]["fc"].update(type=[]), "wanted one of QLinear"),
    "type unknown": (lambda h: h["layers"]["fc"].update(type="os.system"), "wanted one of"),
    "type swapped": (lambda h: h["layers"]["fc"].update(type="QConv2d"), "'fc' is Linear"),
    "unknown layer": (lambda h: h["layers"].update(nope=h["layers"]["fc"]), "no module of that"),
    "method": (lambda h: h["layers"].update(forward=h["layers"]["fc"]), "no module of that"),
    "root": (lambda h: h["layers"].update({"": h["layers"]["fc"]}), "'' is Net"),
    "fold a linear": (lambda h: h["folded"].append("fc"), "wanted a batch norm"),
    "fold unknown": (lambda h: h["folded"].append("nope"), "no module of that name"),
    "rebuild a plain layer": (lambda h: h["rebuilt"].append("fc"), "wanted a subclass"),
    "huge": (lambda h: h["layers"]["fc"].update(in_features=2**62), "'fc' is Linear"),
    "negative": (lambda h: h["layers"]["conv"].update(stride=[-1, 0]), "'conv' is Conv2d"),
    "text": (lambda h: h["layers"]["conv"].update(kernel_size="3"), "'conv' is Conv2d"),
    "null": (lambda h: h["layers"]["conv"].update(groups=None), "'conv' is Conv2d"),
    "argument missing": (lambda h: h["layers"]["conv"].pop("groups"), "'conv' is Conv2d"),
    "argument more": (lambda h: h["layers"]["conv"].update(code="x"), "'conv' is Conv2d"),
    "bias text": (lambda h: h["layers"]["conv"].update(bias="yes"), "'conv' is Conv2d"),
    "bias off": (lambda h: h["layers"]["conv"].update(bias=False), "does not fit"),
    "layer left out": (lambda h: h["layers"].pop("fc"), "fc.weight is torch.int8"),
    "fold left out": (lambda h: h.update(folded=[]), "does not fit"),
    "rebuild left out": (lambda h: h.update(rebuilt=[]), "'same' is Padded"),
}


@pytest.mark.parametrize("name", HOSTILE_HEADERS)
def test_a_hostile_header_is_refused(name: str, path: Path) -> None:
    change, message = HOSTILE_HEADERS[name]
    rewrite(path, lambda header, tensors: change(header))
    with pytest.raises(ValueError, match=message):
        load(path, Net())


def put(name: str, value: Any) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: torch.as_tensor(value)})


HOSTILE_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop("norm.weight"), "norm.weight"),
    "weight missing": (lambda t: t.pop("fc.weight"), "fc.weight"),
    "more": (put("more", torch.zeros(2)), "more"),
    "shape": (put("fc.weight", torch.zeros(8, 9, dtype=torch.int8)), "size mismatch"),
    "fewer axes": (put("conv.weight", torch.zeros(8, dtype=torch.int8)), "size mismatch"),
    "empty": (put("fc.weight", torch.zeros(0, 8, dtype=torch.int8)), "size mismatch"),
    "weight float": (put("fc.weight", torch.zeros(8, 8)), "fc.weight is torch.float32"),
    "float layer's dtype": (put("norm.weight", torch.zeros(8).double()), "float64"),
    "scale shape": (put("fc.weight_scale", torch.ones(7)), "size mismatch"),
    "scale zero": (put("fc.weight_scale", torch.zeros(8)), "not greater than 0"),
    "scale negative": (put("fc.weight_scale", -torch.ones(8)), "not greater than 0"),
    "scale nan": (put("fc.weight_scale", torch.full((8,), torch.nan)), "not finite"),
    "scale inf": (put("fc.weight_scale", torch.full((8,), torch.inf)), "not finite"),
    "bias nan": (put("fc.bias", torch.full((8,), torch.nan)), "NaN"),
    "input scale zero": (put("fc.input_scale", 0.0), "not greater than 0"),
    "input scale nan": (put("fc.input_scale", torch.nan), "not finite"),
    "input scale int": (put("fc.input_scale", 1), "int64"),
    "input scale shape": (put("fc.input_scale", torch.ones(2)), "size mismatch"),
    "input scale alone": (lambda t: t.pop("conv.input_zero_point"), "together"),
    "zero point beyond": (
        put("fc.input_zero_point", torch.tensor(256, dtype=torch.int32)),
        "wanted 0 to 255",
    ),
    "zero point below": (
        put("fc.input_zero_point", torch.tensor(-1, dtype=torch.int32)),
        "wanted 0 to 255",
    ),
    "zero point float": (put("fc.input_zero_point", 3.0), "float32"),
}


@pytest.mark.parametrize("name", HOSTILE_TENSORS)
def test_a_hostile_tensor_is_refused(name: str, path: Path) -> None:
    change, message = HOSTILE_TENSORS[name]
    rewrite(path, lambda header, tensors: change(tensors))
    with pytest.raises(ValueError, match=message):
        load(path, Net())


# --- another model


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fc = self.alias = nn.Linear(8, 9)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(8, 8)), "no module of that name"),
        (Wider(), "'fc' is Linear.*out_features=9"),
    ],
    ids=["another", "wider"],
)
def test_a_model_of_another_architecture_is_refused(
    model: nn.Module, message: str, path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load(path, model)


def test_a_quantized_model_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="wants a float instance"):
        load(path, load(path, Net()))


def test_what_is_no_model_is_refused(path: Path) -> None:
    with pytest.raises(TypeError, match="wanted the path, then a float model"):
        load(path, Net)  # type: ignore[arg-type]


# --- whole networks, damaged at random


class Small(nn.Module):
    """Two programs, and a float operator between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = F.relu(self.a(x)).mean((2, 3))
        return {"y": self.b(y.sort(1)[0])}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Saved networks: one that is a single program, and one that is not."""
    folder = tmp_path_factory.mktemp("whole")
    body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.Flatten())
    models = {"one": nn.Sequential(body, nn.Linear(144, 5)), "two": Small()}
    for name, model in models.items():
        save(fastq.quantize_model(model.eval(), images(), progress=False), folder / name)
    return {name: (folder / name).read_bytes() for name in models}


def load_and_run(path: Path) -> None:
    """Refused with ValueError, or read; then it computes, or refuses its input."""
    for read in (load, fastq.load_program):
        try:
            network: Any = read(path)
        except ValueError as error:
            assert str(path) in str(error)
            continue
        x = images()[:2]
        try:
            network(x if read is load else x.numpy())
        except (ValueError, TypeError):
            continue
        except Exception:  # a float operator may raise anything: torch or NumPy checks arguments
            layout = network.layout if read is load else network._layout
            if all(stage.program >= 0 for stage in layout.stages):
                raise


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = [place] if place else []
    for key, part in items:
        deeper = isinstance(part, dict | list)
        found += places(part, (*place, key)) if deeper else [(*place, key)]
    return found


ODD: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**62, 2**70, 0.5, -1.5, 1e300, float("nan"), "", "x", "q0", [],
    [1], [[1, 1], [1, 1]], {}, {"array": "x"}, {"float": "inf"}, {"dict": {}}, {"Requant": {}},
    {"ref": 9}, {"size": [0, 2**62, 0]}, {"size": [9, 1, 0]}, {"size": [0]},
]  # fmt: skip


def spoil(rng: random.Random, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Changes one thing of the network."""
    names, network = sorted(tensors), header["network"]
    if rng.random() < 0.8:
        *path, last = rng.choice(places({k: network[k] for k in network if k != "recipe"}))
        holder = network
        for key in path:
            holder = holder[key]
        now = holder[last]
        if isinstance(now, int) and rng.random() < 0.5:
            holder[last] = now + rng.choice([-1, 1, 100])
        elif isinstance(now, list | dict) and now and rng.random() < 0.5:
            now.pop(rng.choice(list(now)) if isinstance(now, dict) else rng.randrange(len(now)))
        else:
            holder[last] = copy.deepcopy(rng.choice(ODD))
        return
    name = rng.choice(names)
    tensor = tensors.pop(name)
    match rng.randrange(5):
        case 0:
            tensors[rng.choice(["layout.weight", "a.b.c", "x", ".x", "x.", "to.x"])] = tensor
        case 1:
            tensors[name] = tensor.to(rng.choice([torch.bfloat16, torch.float64, torch.int64]))
        case 2:
            tensors[name] = tensor.flatten()[:1].clone()
        case 3:
            tensors[name] = tensor.unsqueeze(0)
        case 4:
            spoilt = tensors[name] = tensor.clone()
            spoilt.view(-1).view(torch.uint8)[-1] = rng.choice([0, 127, 255])


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_network_with_any_part_exchanged(
    name: str, whole: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "q"
    for seed in range(250):
        path.write_bytes(whole[name])
        rng = random.Random(f"{name} {seed}")
        rewrite(path, lambda header, tensors, rng=rng: spoil(rng, header, tensors))
        load_and_run(path)


SORT, ADD = "aten.sort.default", "aten.add.Tensor"


@pytest.mark.parametrize(
    ("op", "attrs", "refused"),
    [
        ("aten", {"target": SORT, "args": (Ref(0),), "kwargs": {}}, ""),
        (
            "aten",
            {"target": SORT, "args": (Ref(1),), "kwargs": {}},
            rf"{SORT} takes input 1, but has 1",
        ),
        (
            "aten",
            {"target": ADD, "args": (Ref(0), [Ref(0), Ref(7)]), "kwargs": {}},
            rf"{ADD} takes input 7, but has 1",
        ),
        (
            "aten",
            {"target": ADD, "args": (Ref(0), 1), "kwargs": {"alpha": Ref(2)}},
            rf"{ADD} takes input 2, but has 1",
        ),
        (  # a call takes the results of those before it, too
            "pointwise",
            {"calls": [(ADD, (Ref(0), 1), {}), (ADD, (Ref(0), Ref(1)), {})]},
            "",
        ),
        (
            "pointwise",
            {"calls": [(ADD, (Ref(0), 1), {}), (ADD, (Ref(0), Ref(2)), {})]},
            rf"{ADD} takes input 2, but has 2",
        ),
        (
            "aten",
            {"target": ADD, "args": (Ref(0), "%weight"), "kwargs": {}},
            rf"{ADD} takes tensor 'weight', which the file has not",
        ),
    ],
)
def test_a_float_operator_takes_what_is_there(
    op: str, attrs: dict[str, Any], refused: str, whole: dict[str, bytes], tmp_path: Path
) -> None:
    def change(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        stage = next(s for s in header["network"]["stages"] if s["attrs"].get("target"))
        stage["op"], stage["attrs"] = op, {k: encode_value(v, NAMED) for k, v in attrs.items()}

    path = tmp_path / "q"
    path.write_bytes(whole["two"])
    rewrite(path, change)
    for read in (load, fastq.load_program):
        if refused:
            with pytest.raises(ValueError, match=refused):
                read(path)
        else:
            read(path)


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_network_with_any_bytes_exchanged(
    name: str, whole: dict[str, bytes], tmp_path: Path
) -> None:
    path, data, rng = tmp_path / "q", whole[name], random.Random(name)
    for _ in range(150):
        spoilt = bytearray(data)
        for _ in range(rng.choice([1, 1, 4])):
            spoilt[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(spoilt[: rng.choice([len(data), rng.randrange(len(data))])])
        for read in (load, fastq.load_program):
            if path.read_bytes() != data:
                with pytest.raises(ValueError, match="q"):
                    read(path)


SPECS = {
    "a factory": json.dumps(
        [1, {"type": "collections.defaultdict", "children_spec": [], "context": {
            "default_factory_module": "this", "default_factory_name": "d", "dict_context": []}}]
    ),
    "an enum": json.dumps(
        [1, {"type": "builtins.dict", "children_spec": [],
             "context": '[{"\\u005f_enum__": true, "fqn": "this:d", "name": "x"}]'}]
    ),
    "of another version": "[2, {}]",
    "deep": "[" * 100_000,
    "a kind that nobody knows": '[1, {"type": "x", "context": null, "children_spec": []}]',
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_imports_nothing(name: str, whole: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "q"
    path.write_bytes(whole["two"])
    rewrite(path, lambda header, _: header["network"]["specs"].__setitem__(1, SPECS[name]))
    with pytest.raises(ValueError, match="a spec is not in order"):
        load(path)
    assert "this" not in sys.modules


def test_specs_of_all_kinds_are_read_again() -> None:
    Pair = namedtuple("Pair", ["left", "right"])
    for value in (
        ((1, {"a": [2, Pair(3, OrderedDict(z=1))]}), {}), defaultdict(list, a=1), deque([1]), None,
    ):  # fmt: skip
        spec = pytree.tree_structure(value)
        assert _read_spec(spec_text(spec)) == spec


@pytest.mark.parametrize("name", ["topk", "sort", "max"])
def test_results_of_torchs_own_kinds(name: str, tmp_path: Path) -> None:
    """As a new process reads them, too."""
    ends = {"topk": lambda y: torch.topk(y, 3), "sort": torch.sort, "max": lambda y: y.max(1)}
    model = call(lambda net, x: ends[name](net.a(x)), a=lambda: nn.Linear(8, 10))().eval()
    x = torch.randn(32, 8)
    int8 = fastq.quantize_model(model, x, progress=False)
    wanted = int8(x)
    assert type(wanted) is getattr(torch.return_types, name)
    fastq.save(int8, tmp_path / "int8")
    again = fastq.load(tmp_path / "int8")(x)
    assert type(again) is type(wanted)
    assert torch.equal(again.values, wanted.values) and torch.equal(again.indices, wanted.indices)
    torch.save(x, tmp_path / "x")
    code = (
        f"import torch, fastq; x = torch.load({str(tmp_path / 'x')!r})\n"
        f"print(type(fastq.load({str(tmp_path / 'int8')!r})(x)).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(name)


def test_operators_of_others_are_not_written(tmp_path: Path) -> None:
    """`load` would refuse them: a file may have named them."""

    def forward(net: Any, x: Tensor) -> Tensor:
        return net.b(torch.ops.others.twice(net.a(x)))

    with torch.library._scoped_library("others", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        model = call(forward, a=lambda: nn.Linear(4, 8), b=lambda: nn.Linear(8, 2))().eval()
        x = torch.randn(8, 4)
        int8 = fastq.quantize_model(model, x, progress=False)
        assert (int8(x) - model(x).detach()).norm() < 0.1
        path = tmp_path / "model.safetensors"
        with pytest.raises(
            ValueError, match=r"save: twice: 'others\.twice\.default' is no operator"
        ):
            fastq.save(int8, path)
    assert not path.exists()
