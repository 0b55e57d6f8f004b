"""Files from elsewhere do no harm: mutated ones of every kind (tests/fuzz.py), and the known attacks one by one."""

import gzip
import io
import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

if sys.platform != "linux":
    pytest.skip("what a process takes is read from /proc", allow_module_level=True)

import fuzz
from mutate import inflated_yaml
from seeds import KINDS, Payload

from ticketfind import TicketfindError, assemble, checkpoint, cli, limits, load_ticket, rundir, terminal, verify
from ticketfind.layers import from_layers
from ticketfind.recipe import Recipe

CONTROL = {chr(c) for c in (*range(32), 127, *range(128, 160), 0x202E)} - {"\n"}


@pytest.fixture(scope="module", autouse=True)
def prepared() -> None:
    fuzz.prepare()


@pytest.mark.parametrize("name", fuzz.READERS)
def test_mutated_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    found = fuzz.run(fuzz.READERS[name], lambda number: fuzz.inputs_of(name, 1, number), range(200), tmp_path)
    assert not found.faults
    assert found.inputs == 200 and 0 < found.accepted < 180


@pytest.mark.parametrize(
    ("read", "fault"),
    [
        (lambda path: {}["a"], "KeyError"),
        (lambda path: torch.zeros(2**26), "memory"),
        (lambda path: np.empty(2**28, np.uint8), "memory"),
        (lambda path: bytearray(2**28), "memory"),
        (lambda path: exec("1"), "does exec"),
        (lambda path: os.system("true"), "does os.system"),
        (lambda path: path.with_name("other").write_text(""), "does open"),
        (lambda path: os._exit(3), "the process ended"),
        (lambda path: [None for _ in iter(int, 1)], "more than 0.2 s"),
    ],
)
def test_the_fuzzer_finds_what_it_looks_for(
    read: Callable[[Path], Any], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    found = fuzz.run(fuzz.Reader(read, "log", "f"), lambda number: b"x", range(1), tmp_path)
    assert len(found.faults) == 1 and fault in found.faults[0][1]


# -------------------------------------------------------------------------------------- attacks, one by one


def sized(header: bytes, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def a_ticket(change: Callable[[dict[str, Any]], Any] = lambda about: None, kind: str = "ticket") -> bytes:
    """A ticket with its metadata changed, as a dict, or replaced by a text."""
    data = KINDS[kind]()[0]
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    about = json.loads(header["__metadata__"]["ticketfind"])
    text = change(about)
    header["__metadata__"]["ticketfind"] = text if isinstance(text, str) else json.dumps(about)
    return sized(json.dumps(header).encode(), data[8 + length :])


def with_header(header: Any, body: int) -> bytes:
    return sized(json.dumps(header).encode(), bytes(body))


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def spoiled(number: float, kind: str) -> bytes:
    """A ticket with this as one of its surviving weights."""
    data = bytearray(KINDS[kind]()[0])
    length = int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8 : 8 + length])
    start = tensors["init/out.weight"]["data_offsets"][0]
    data[8 + length + start : 12 + length + start] = struct.pack("<f", number)
    return bytes(data)


def many_tensors(count: int) -> bytes:
    one = '"%x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return sized(("{" + ",".join(one % n for n in range(count)) + "}").encode())


def unpacking_ticket() -> bytes:
    """2 MB that are to become 84."""
    shape = {"w": [2**24]}
    about = {"format": 1, "layout": "compact", "recipe": {}, "sigma": {}, "aliases": {}, "claims": {}, "versions": {}}
    about |= {"round": 1, "replicate": 0, "iteration": 0, "shapes": shape}
    tensors = {"mask/w": torch.zeros(2**21, dtype=torch.uint8), "init/w": torch.zeros(0)}
    return save(tensors, {"ticketfind": json.dumps(about)})


TICKETS = {
    "deep metadata": (lambda: a_ticket(lambda about: "[" * 10**6), "nested too deeply|expected JSON"),
    "deep recipe": (lambda: a_ticket(lambda about: about.update(recipe=deep(400))), "levels of values within"),
    "many values": (lambda: a_ticket(lambda about: about.update(recipe={"a": [0] * 10**5})), "more than 20,000 values"),
    "a bomb of lists": (
        lambda: a_ticket(lambda about: "[" + "[]," * 2_500_000 + "0]"),
        "more values than so few bytes",
    ),
    "an infinite claim": (
        lambda: a_ticket(lambda about: '{"format": 1, "remaining": 1e999}'),
        "too large for a number",
    ),
    "a number of 5,000 digits": (lambda: a_ticket(lambda about: "9" * 5000), "expected JSON"),
    "a huge round": (lambda: a_ticket(lambda about: about.update(round=10**400)), "metadata round: expected a count"),
    "a sigma of text": (lambda: a_ticket(lambda about: about.update(sigma={"w": "1"})), "metadata sigma"),
    "a claim of text": (lambda: a_ticket(lambda about: about.update(claims={"ticket": "100 %"})), "metadata claims"),
    "no header": (lambda: (2**63).to_bytes(8, "little"), "reading it failed"),
    "a header beyond the file": (lambda: (10**6).to_bytes(8, "little") + b"{}", "reading it failed"),
    "a header of 9 MB": (lambda: sized(b"{" + b" " * 9 * 10**6 + b"}"), "its header has"),
    "10^6 tensors": (lambda: many_tensors(10**6), "its header has"),
    "70,000 tensors": (lambda: many_tensors(70_000), "it holds 70,000 tensors"),
    "offsets beyond the file": (lambda: with_header({"mask/w": entry(0, 400, [100])}, 4), "reading it failed"),
    "offsets that overlap": (lambda: with_header({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, 12), "reading it"),
    "offsets backwards": (lambda: with_header({"a": entry(8, 0, [2])}, 8), "reading it failed"),
    "a shape that overflows": (
        lambda: with_header({"a": entry(0, 0, [2**62, 2**62, 0])}, 0),
        "reading it failed|expec",
    ),
    "a mask that is neither": (
        lambda: with_header({"mask/w": entry(0, 2, [2], "BOOL")}, 0) + b"\x00\x02",
        "other bytes than 0 and 1",
    ),
    "a NaN weight": (lambda: spoiled(float("nan"), "ticket"), "init/out.weight: expected finite weights"),
    "an infinite weight": (lambda: spoiled(float("inf"), "compact"), "init/out.weight: expected finite weights"),
}


def deep(levels: int) -> Any:
    found: Any = 0
    for _ in range(levels):
        found = {"a": found}
    return found


def zip_of(*members: tuple[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def npy_of(shape: Any, descr: str = "<f4", body: bytes = b"") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (3,)})
    old = file.getvalue()
    header = old[10:].replace(b"(3,)", repr(shape).encode())[:-1] + b"\n"
    return old[:8] + struct.pack("<H", len(header)) + header + body


def pickled_zip(payload: bytes) -> bytes:
    return zip_of(("a/data.pkl", payload), ("a/version", b"3"), ("a/data/0", bytes(64)))


def tensor_pickle(size: str, stride: str = "(1,)", elements: int = 4) -> bytes:
    """As torch.save writes one tensor, with these numbers."""

    def numbers(text: str) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", n) for n in eval(text)) + b"t"

    return (
        b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n"
        b"X\x01\0\0\x000X\x03\0\0\0cpu\x8a\x08" + struct.pack("<q", elements) + b"tQK\0" + numbers(size)
        + numbers(stride) + b"\x89ccollections\nOrderedDict\n)RtRs."
    )  # fmt: skip


def called(name: bytes, number: int) -> bytes:
    return b"\x80\x02}X\x01\0\0\0wc" + name + b"\n\x8a\x08" + struct.pack("<q", number) + b"\x85Rs."


def hidden_call(name: bytes, number: int) -> bytes:
    """The same within the function that tensors with attributes are made by."""
    inner = b"c" + name + b"\nctorch\nTensor\n\x8a\x08" + struct.pack("<q", number) + b"\x85}t"
    return b"\x80\x02}X\x01\0\0\0wctorch._tensor\n_rebuild_from_type_v2\n(" + inner + b"Rs."


def tuple_laughs() -> bytes:
    """A key that is a tuple of two, of two, ... 40 times over: hashing it takes 2^40 steps."""
    levels = b"".join(b"q%ch%c\x86" % (n, n) for n in range(40))
    return b"\x80\x02})" + levels + b"K\0s."


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def in_itself() -> Any:
    found: dict[str, Any] = {"lr": 0.1}
    found["model"] = found
    return found


def shared_containers() -> Any:
    """Each of 30 mappings holds the one before under all the usual names."""
    found: dict[str, Any] = {"lr": 0.1}
    for _ in range(18):
        found = dict.fromkeys(("model", "ema", "net", "params"), found)
    return found


TORCH = {
    "runs code": (lambda: saved({"w": torch.zeros(2), "x": Payload()}), "never unpickles"),
    "a larger tensor than its bytes": (
        lambda: pickled_zip(tensor_pickle("(10**12,)")),
        "larger than what the file holds",
    ),
    "a tensor of one number, 10^12 times": (
        lambda: pickled_zip(tensor_pickle("(10**12,)", "(0,)")),
        "larger than what",
    ),
    "a larger storage than the file": (
        lambda: pickled_zip(tensor_pickle("(4,)", elements=10**12)),
        "longer than the file",
    ),
    "a negative place": (lambda: pickled_zip(tensor_pickle("(-4,)")), "another way than torch.save"),
    "10^12 bytes": (lambda: pickled_zip(called(b"builtins\nbytearray", 10**12)), "builtins.bytearray of a size"),
    "10^12 numbers": (lambda: pickled_zip(called(b"torch\nFloatTensor", 10**12)), "torch.FloatTensor of a size"),
    "10^12 numbers, hidden": (
        lambda: pickled_zip(hidden_call(b"torch\nFloatTensor", 10**12)),
        "torch.FloatTensor of a",
    ),
    "a key that takes for ever": (lambda: pickled_zip(tuple_laughs()), "hold one another many times over"),
    "mappings in themselves": (lambda: saved(in_itself()), "expected named tensors, found lr, model"),
    "mappings in many places": (lambda: saved(shared_containers()), "expected named tensors"),
    "compressed": (lambda: zip_of(("a/data.pkl", bytes(10**8)), how=zipfile.ZIP_DEFLATED), "it is compressed"),
    "another pickle by another name": (
        lambda: zip_of(
            ("a/DATA.pkl", called(b"torch\nFloatTensor", 10**12)), ("a/data.pkl", b"\x80\x02}."), ("a/version", b"3")
        ),
        "several pickles",
    ),
    "a text of 4 GB to come": (lambda: b"\x80\x02X\xff\xff\xff\xff", "are to follow"),
}
NPZ = {
    "objects": (lambda: KINDS["npz"]()[3], "Object arrays cannot be read"),
    "a zip bomb": (lambda: zip_of(("x_train.npy", bytes(10**8)), how=zipfile.ZIP_DEFLATED), "would be read"),
    "a shape beyond its bytes": (
        lambda: zip_of(("x_train.npy", npy_of((10**12,)))),
        r"expected the array \(1000000000000,\)",
    ),
    "a shape that overflows": (lambda: zip_of(("x_train.npy", npy_of((2**32, 2**32)))), "expected the array"),
    "numbers of no bytes": (lambda: zip_of(("x_train.npy", npy_of((10**12,), "|V0"))), "failed"),
    "compressed otherwise": (
        lambda: zip_of(("x.npy", npy_of((1,), body=bytes(4))), how=zipfile.ZIP_LZMA),
        "as numpy does not",
    ),
    "20,000 members": (lambda: zip_of(*((f"{n}.npy", b"") for n in range(20_000))), "20,000 members"),
    "10^5 members with long names": (lambda: zip_of(*((f"{n:060}", b"") for n in range(10**5))), "very many members"),
    "a deep header": (
        lambda: zip_of(("x.npy", npy_of("[" * 3000).replace(b"'[", b"[").replace(b"[',", b"["))),
        "failed",
    ),
}
IDX = {
    "a bomb that says so": (
        lambda: gzip.compress(bytes([0, 0, 8, 1]) + struct.pack(">I", 10**8) + bytes(10**8), 1),
        "so small a file",
    ),
    "a bomb that does not": (
        lambda: gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 9]) + bytes(10**8), 1),
        "found .* or more",
    ),
    "sides that overflow": (lambda: gzip.compress(bytes([0, 0, 8, 4]) + b"\xff" * 16), "so small a file"),
    "255 sides": (lambda: gzip.compress(bytes([0, 0, 8, 255]) + bytes(4 * 255)), "so small a file"),
    "a wrong sum": (lambda: gzip.compress(KINDS["idx"]()[0])[:-8] + bytes(8), "CRC check failed"),
}
RECIPES = {
    "billion laughs": (lambda: inflated_yaml(30, "l0: &l0 [x]").encode(), "more than 20,000 values"),
    "merged laughs": (lambda: merged_laughs().encode(), "YAML recipe|unknown key|more than"),
    "a value within itself": (lambda: b"data: {args: &a {b: *a}}", "levels of values within one another"),
    "a Python object": (lambda: b"model: !!python/object/apply:os.system [touch /tmp/x]", "expected a YAML recipe"),
    "a date that is none": (lambda: b"name: !!timestamp x", "expected a YAML recipe"),
    "deep": (lambda: b"[" * 50_000, "expected a YAML recipe"),
    "digits for ever": (lambda: b"name: " + b"1" * 100_000 + b"x", "expected letters"),
    "a number of 400,000 bits": (lambda: b"run: {seed: 0x" + b"f" * 100_000 + b"}", "more than 1,000 bits"),
    "10,000 unknown keys": (lambda: ("run:\n" + "".join(f" k{n}: 1\n" for n in range(9000))).encode(), "and 8950 more"),
    "large": (lambda: b"#" * 10**6, "at most 131,072 bytes"),
    "10^10 replicates": (lambda: b"run: {replicates: 1" + b"0" * 1000 + b"}", "more than 1,000 bits"),
}


def merged_laughs() -> str:
    lines = ["l0: &l0 {a: 1}", *(f"l{n}: &l{n} {{<<: [{', '.join([f'*l{n - 1}'] * 9)}]}}" for n in range(1, 20))]
    return "\n".join(lines)


def a_line(**changes: Any) -> bytes:
    return (json.dumps({**json.loads(KINDS["log"]()[0].splitlines()[0]), **changes}) + "\n").encode()


LOGS = {
    "deep": (lambda: b"[" * 10**5 + b"\n", "expected a JSON object of a finished training"),
    "deep inside": (lambda: b'{"round": 0, "replicate": 0, "curve": ' + b'{"a":' * 10**5 + b"1\n", "expected a JSON"),
    "no test examples": (lambda: a_line() + a_line(replicate=1, test_size=0), "test_size: expected a number"),
    "a huge accuracy": (lambda: a_line(accuracy_early=10**400) + a_line(replicate=1), "accuracy_early: expected a num"),
    "a bomb": (lambda: b"[" + b"{}," * 1_000_000 + b"0]\n", "too much in"),
    "infinite": (lambda: a_line(accuracy_end=0.5).replace(b"0.5", b"1e999", 1), "expected a JSON object"),
}
INDICES = {
    "another folder": (lambda: b'{"weight_map": {"w": "../w-1.safetensors"}}', "expected shards in the same folder"),
    "the folder above": (lambda: b'{"weight_map": {"w": ".."}}', "no such file"),
    "an absolute path": (lambda: b'{"weight_map": {"w": "/etc/passwd"}}', "expected shards in the same folder"),
    "a very long name": (
        lambda: json.dumps({"weight_map": {"w": "a" * 10**5}}).encode(),
        "expected shards in the same",
    ),
    "deep": (lambda: b'{"weight_map":' * 10**5, "nested too deeply|expected an index"),
    "a NUL": (lambda: b'{"weight_map": {"w": "a\\u0000b"}}', "no such file"),
}
ATTACKS = [
    pytest.param(reader, make, text, id=f"{reader}: {what}")
    for reader, attacks in {
        "ticket, full": TICKETS,
        "checkpoint .pt": TORCH,
        "data .npz": NPZ,
        "IDX .gz": IDX,
        "recipe": RECIPES,
        "log.jsonl": LOGS,
        "checkpoint, sharded": INDICES,
    }.items()
    for what, (make, text) in attacks.items()
]


@pytest.mark.parametrize(("name", "make", "text"), ATTACKS)
def test_attacks(name: str, make: Callable[[], bytes], text: str, tmp_path: Path) -> None:
    reader, data = fuzz.READERS[name], make()
    found = fuzz.run(reader, lambda number: data, range(1), tmp_path)
    assert not found.faults and not found.accepted
    (tmp_path / reader.file).write_bytes(data)
    with pytest.raises(TicketfindError, match=text):
        reader.read(tmp_path / reader.file)


def test_a_compact_ticket_unpacks_to_no_more_than_what_is_compressed_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t").write_bytes(unpacking_ticket())
    assert load_ticket(tmp_path / "t").init["w"].shape == (2**24,)
    monkeypatch.setattr(limits, "RATIO", 30)
    with pytest.raises(TicketfindError, match="unpacks to much more than its size"):
        load_ticket(tmp_path / "t")


def test_a_run_that_says_it_has_very_many_replicates_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(a_line())
    from ticketfind.results import rounds_of

    assert rounds_of(rundir.RunDir(tmp_path).log(), replicates=10**15, given_tolerance=None) == []


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_any_values_are_a_recipe_or_refused(value: Any) -> None:
    for recipe in (value, {"model": value}, {"train": {"lr": value}}, {"data": {"args": value}}, {"name": value}):
        try:
            from_layers(recipe)
        except TicketfindError as error:
            assert len(str(error).splitlines()) <= 60


# ------------------------------------------------------------------------------------ memory of large files


def large(kind: str) -> bytes:
    """A valid file of some 24 MB."""
    pixels = np.random.default_rng(0).integers(0, 256, (8000, 56, 56), np.uint8)
    if kind == "idx":
        return bytes([0, 0, 8, 3]) + struct.pack(">3I", *pixels.shape) + pixels.tobytes()
    if kind == "npz":
        file = io.BytesIO()
        np.savez(file, x=pixels, y=np.zeros(8000))
        return file.getvalue()
    if kind == "log":
        curve = {key: np.random.default_rng(1).random(5000).tolist() for key in "abcd"}
        return b"".join(a_line(round=n, curve=curve) for n in range(60))
    weights = {f"init/{n}": torch.randn(1000, 1000) for n in range(6)}
    if kind == "torch":
        return saved(weights)
    data = a_ticket()
    length = int.from_bytes(data[:8], "little")
    about = json.loads(data[8 : 8 + length])["__metadata__"]
    return save({**weights, **{name.replace("init", "mask"): w > 0 for name, w in weights.items()}}, about)


@pytest.mark.parametrize(
    ("kind", "name", "read"),
    [
        ("idx", "f", fuzz.formats.read_idx),
        ("npz", "f.npz", fuzz.formats.read_npz),
        ("log", "log.jsonl", lambda path: rundir.RunDir(path.parent).log()),
        ("torch", "f.pt", checkpoint.read),
        ("ticket", "t.safetensors", load_ticket),
    ],
)
def test_large_files_take_at_most_four_times_their_size(
    kind: str, name: str, read: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SPARE", 2**20)
    data = large(kind)
    found = fuzz.run(fuzz.Reader(read, "", name), lambda number: data, range(1), tmp_path)
    assert found.accepted == 1 and not found.faults
    assert found.bytes < 4 * len(data) + 2**24


# --------------------------------------------------------------------------------------------- what is shown

NASTY = "\x1b[2J\x1b]0;owned\x07\nfake: line\r\u202e[bold]x[/]"


def nasty_ticket(path: Path) -> None:
    from ticketfind.ticket import Provenance, Ticket

    recipe = Recipe().plain()
    recipe["model"]["spec"] = recipe["data"]["spec"] = NASTY
    mask, weight = torch.tensor([True, False]), torch.randn(2)
    names = (NASTY, "../../etc/passwd", "/etc/passwd", "..")
    about = Provenance(
        recipe=recipe, round=1, replicate=0, iteration=0, sigma=dict.fromkeys(names, 1.0), versions={"torch": NASTY}
    )
    Ticket(dict.fromkeys(names, mask), dict.fromkeys(names, weight), about).save(path)


COMMANDS = (
    ["inspect", "t.safetensors"], ["inspect", "t.safetensors", "--json"], ["verify", "t.safetensors"],
    ["diff", "t.safetensors", "t.safetensors"], ["diff", "t.safetensors", "t.safetensors", "--json"],
    ["export", "t.safetensors", "-o", "out"], ["export", "t.safetensors", "-o", "out", "--format", "compact"],
    ["export", "t.safetensors", "-o", "out", "--format", "torch-prune"], ["eval", "t.safetensors"],
    ["search", "--model", "lenet-300-100", "--checkpoint", "t.safetensors"], ["search", "bad.yaml"],
    ["inspect", "bad.safetensors"], ["verify", "bad.safetensors"], ["inspect", "run"],
)  # fmt: skip


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_no_name_from_a_file_steers_the_terminal_or_names_a_path(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    nasty_ticket(Path("t.safetensors"))
    weights, about = {f"mask/{NASTY}": torch.ones(2)}, {"ticketfind": json.dumps({"format": 1, "layout": NASTY})}
    save_file(weights, "bad.safetensors", about)
    Path("bad.yaml").write_text(json.dumps({NASTY: 1, "model": {NASTY: NASTY}, "name": NASTY}))
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text("{}")
    Path("run/log.jsonl").write_text(json.dumps({"round": 0, "replicate": 0, "failed": NASTY}) + "\n" + NASTY + "\n")
    before = {path for path in tmp_path.rglob("*")}
    monkeypatch.setattr(sys, "argv", ["ticketfind", *arguments])
    monkeypatch.setenv("NO_COLOR", "1")
    try:
        cli.main()
    except SystemExit as end:
        assert end.code in (0, 1, 2, None)
    out = capsys.readouterr()
    assert out.out + out.err
    assert not CONTROL & {*out.out, *out.err}
    assert {path for path in tmp_path.rglob("*")} - before <= {tmp_path / "out"}


def test_printing_shows_control_characters_and_keeps_styles(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.text import Text

    terminal.Screen().print(Text("a\x1b[31mb"))
    terminal.Screen().print("a\x1b[31mb")
    assert capsys.readouterr().out == "a\N{REPLACEMENT CHARACTER}[31mb\n" * 2


# ------------------------------------------------------------------------------------- what a ticket names

NAMED = {
    "model.spec": ("evil.py:make", "evil:make", "./evil.py:make", "hf-hub:a/b", "hf_hub:a/b", "timm:hf-hub:a/b",
                   "local-dir:.", "package.evil:make"),
    "data.spec": ("evil.py:make", "evil:make", "timm:hfds/a/b", "timm:HFDS/a/b", "timm:hfids/a", "timm:tfds/a", "s3:x"),
    "train.loss": ("evil.py:make", "evil:make"),
    "train.metric": ("evil.py:make", "evil:make"),
    "train.trainer": ("evil.py:make", "evil:make"),
    "train.command": ("touch pwned {init}",),
}  # fmt: skip


@pytest.mark.parametrize(("key", "spec"), [(key, spec) for key, specs in NAMED.items() for spec in specs])
def test_what_a_ticket_names_is_not_followed(
    key: str, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text("open('pwned', 'w')\ndef make(*args, **kwargs): open('pwned', 'w')\n")
    own = Recipe().plain()
    section, _, name = key.partition(".")
    own[section][name] = spec
    if key in ("train.metric", "train.trainer", "train.command"):
        own["run"]["tolerance"] = 1.0
    with pytest.raises(TicketfindError, match=r"names code .*--trust"):
        assemble.of_ticket(own, {}, where=tmp_path / "t", elsewhere=True, trusted=False, arms=1)
    assert not Path("pwned").exists() and "evil" not in sys.modules


def test_a_score_that_a_ticket_names_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text("open('pwned', 'w')\n")
    own = Recipe().plain()
    own["prune"]["score"] = "evil.py:score"
    assemble.of_ticket(own, {}, where=None, elsewhere=True, trusted=False, arms=1)
    assert not Path("pwned").exists()


def test_naming_the_model_oneself_does_not_trust_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = Recipe().plain()
    own["model"]["spec"], own["data"]["spec"] = "evil:a", "evil:b"
    with pytest.raises(TicketfindError, match=r"names code \(data\.spec: evil:b\)"):
        assemble.of_ticket(own, {"model.spec": "mine:a"}, where=None, elsewhere=True, trusted=False, arms=1)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_verify_reports_weights_that_are_not_finite(number: float, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(spoiled(number, "ticket"))
    found = {check.what: check for check in verify.of_ticket(tmp_path / "t")}
    assert found["surviving weights are finite"].passed is False
    assert found["surviving weights are finite"].found == "NaN or infinity in out.weight"
    (tmp_path / "good").write_bytes(KINDS["ticket"]()[0])  # which has an infinite buffer
    assert all(check.passed for check in verify.of_ticket(tmp_path / "good"))


def test_seeds_are_valid_and_hold_what_would_run_code() -> None:
    assert b"open" in pickle.dumps(Payload())
    assert not Path("/tmp/ticketfind-fuzz-was-here").exists()
