import argparse
import io
import json
import pickle
import tarfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ticketfind import TicketfindError, checkpoint

STATE = {"fc.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.tensor([1.0, -1.0])}


def same(found, expected=STATE):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def sharded(folder, weight_map=None):
    save_file({"fc.weight": STATE["fc.weight"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"fc.bias": STATE["fc.bias"]}, folder / "model-00002-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    weight_map = weight_map or {name: f"model-0000{i}-of-00002.safetensors" for i, name in enumerate(STATE, 1)}
    index.write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": weight_map}))
    return index


# ---------------------------------------------------------------------------------------------- file formats


def test_safetensors_file_and_folder(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    assert same(checkpoint.read(tmp_path / "model.safetensors"))
    assert same(checkpoint.read(tmp_path))


def test_sharded_index_and_folder(tmp_path):
    assert same(checkpoint.read(sharded(tmp_path)))
    assert same(checkpoint.read(tmp_path))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".tar"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(tmp_path, suffix, zipped):
    torch.save(STATE, tmp_path / f"w{suffix}", _use_new_zipfile_serialization=zipped)
    assert same(checkpoint.read(tmp_path / f"w{suffix}"))


@pytest.mark.parametrize(
    "saved",
    [
        {"state_dict": STATE, "epoch": 3},
        {"model": STATE, "optimizer": {"state": {}, "param_groups": []}},
        {"model_state_dict": STATE},
        {"state_dict": STATE, "state_dict_ema": {"fc.weight": torch.zeros(1)}},
        {"ema": STATE},
        {"ema": {"fc.weight": torch.zeros(1)}, "state_dict_ema": {"fc.weight": torch.zeros(1)}, "model": STATE},
        {"state_dict": {"model": STATE}},
        {"model": STATE, "rng_state": torch.get_rng_state(), "loss": torch.tensor(0.1)},  # tensors beside it
        {"params": {"lr": 0.1}, "state_dict": STATE},  # a mapping of a container's name without tensors
        {"params": {"lr": 0.1}, **STATE},
        {**STATE, "version": 3, "note": "no tensor"},
        OrderedDict(STATE),  # as state_dict() gives
    ],
)
def test_containers(tmp_path, saved):
    torch.save(saved, tmp_path / "w.pt")
    assert same(checkpoint.read(tmp_path / "w.pt"))


# -------------------------------------------------------------------------------------- refused and damaged


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("plain", [False, True], ids=["in a zip", "a plain pickle"])
def test_a_pickle_with_a_payload_is_not_run(tmp_path, plain):
    pwned, file = tmp_path / "pwned", tmp_path / "w.pth"
    saved = {"state_dict": STATE, "extra": Payload(pwned)}
    if plain:
        file.write_bytes(pickle.dumps(saved["extra"], protocol=2))
    else:
        torch.save(saved, file)
    with pytest.raises(TicketfindError) as error:
        checkpoint.read(file)
    assert not pwned.exists()
    assert str(file) in str(error.value)
    assert "never unpickles" in str(error.value)
    assert "torch.save(model.state_dict(), FILE)" in str(error.value)  # how to convert it
    pickle.load(io.BytesIO(pickle.dumps(saved["extra"])))
    assert pwned.exists()  # the payload would have worked


def test_a_payload_in_a_tar_of_the_first_torch_is_not_run(tmp_path):
    pwned, file = tmp_path / "pwned", tmp_path / "w.tar"
    with tarfile.open(file, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Payload(pwned), protocol=2)
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    with pytest.raises(TicketfindError, match=r"never unpickles.* save its tensors alone"):
        checkpoint.read(file)
    assert not pwned.exists()


@pytest.mark.parametrize(
    "saved", [nn.Linear(3, 2), {"model": STATE, "args": argparse.Namespace(lr=1)}], ids=["module", "arguments"]
)
def test_other_objects_are_refused_with_a_way_out(tmp_path, saved):
    torch.save(saved, tmp_path / "w.pth")
    with pytest.raises(TicketfindError, match=r"objects other than tensors \(.*\), .* save its tensors alone"):
        checkpoint.read(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pth", b"<!DOCTYPE html><title>404", "expected a torch checkpoint, found a file that begins with b'<!DOC"),
        ("w.pt", b"version https://git-lfs", "expected a torch checkpoint, found a file that begins with b'version"),
        ("w.pt", b"", "expected a torch checkpoint, found a file that begins with b''"),
        ("w.safetensors", b"<!DOCTYPE html><title>404", "expected a safetensors file; reading it failed"),
        ("w.onnx", b"x", "expected .safetensors, .safetensors.index.json or a torch file (.pt .pth .bin .ckpt .tar)"),
        ("w.safetensors.index.json", b"<html>", "expected an index with a weight_map; reading it failed"),
        ("w.safetensors.index.json", b"{}", "expected an index with a weight_map; reading it failed"),
        ("w.safetensors.index.json", b'{"weight_map": {}}', "expected named tensors, found nothing"),
        ("w.safetensors.index.json", b'{"weight_map": {"a": 1}}', "expected shards in the same folder, found 1"),
        ("w.safetensors.index.json", b'{"weight_map": {"a": "../x"}}', "expected shards in the same folder, found"),
        ("w.safetensors.index.json", b'{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors: no such file"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TicketfindError) as error:
        checkpoint.read(tmp_path / name)
    assert message in str(error.value)
    assert str(error.value).startswith(f"checkpoint {tmp_path}/")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_torch_file_is_named(tmp_path, zipped):
    torch.save({"w": torch.randn(1000)}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    raw = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(TicketfindError, match=r"w\.pt: expected a torch checkpoint; reading it failed"):
        checkpoint.read(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"epoch": 3, "name": "x"}, "expected named tensors, found epoch, name"),
        ([torch.ones(2)], "expected named tensors, found a list"),
        (torch.ones(2), "expected named tensors, found a Tensor"),
        ({"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, "expected named tensors, found optimizer"),
        ({}, "expected named tensors, found nothing"),
    ],
)
def test_a_file_without_named_tensors(tmp_path, saved, message):
    torch.save(saved, tmp_path / "w.pt")
    with pytest.raises(TicketfindError, match=message):
        checkpoint.read(tmp_path / "w.pt")


def test_a_missing_file_and_a_folder_of_several(tmp_path):
    with pytest.raises(TicketfindError, match=r"gone\.pt: no such file"):
        checkpoint.read(tmp_path / "gone.pt")
    with pytest.raises(TicketfindError, match=r"or one \.safetensors in the folder, found 0"):
        checkpoint.read(tmp_path)
    for name in ("a", "b"):
        save_file(STATE, tmp_path / f"{name}.safetensors")
    with pytest.raises(TicketfindError, match=r"or one \.safetensors in the folder, found 2"):
        checkpoint.read(tmp_path)


# ------------------------------------------------------------------------------------- fitting to the model


def match(weights, allow=(), wanted=STATE):
    return checkpoint.match(weights, wanted, allow=allow, path=Path("w.pt"))


def prefixed(*prefixes):
    return {"".join(prefixes) + name: value for name, value in STATE.items()}


@pytest.mark.parametrize(
    "prefixes", [(), ("module.",), ("_orig_mod.",), ("model.",), ("module.", "_orig_mod."), ("model.", "module.")]
)
def test_prefixes_of_wrappers_come_off(prefixes):
    assert same(match(prefixed(*prefixes)))


def test_a_prefix_of_the_model_itself_stays():
    assert same(match(prefixed("model."), wanted=prefixed("model.")), prefixed("model."))
    assert same(match(prefixed("module.", "model."), wanted=prefixed("model.")), prefixed("model."))


def test_a_prefix_comes_off_beside_other_entries_if_the_whole_model_is_under_it():
    beside = {**prefixed("module."), "step": torch.ones(1)}
    with pytest.raises(TicketfindError, match=r"does not fit the model; unexpected: step \("):
        match(beside)
    assert same(match(beside, allow=["step"]))


def test_a_prefix_that_only_some_of_the_models_names_have_stays():
    name, *rest = STATE
    mixed = {f"module.{name}": STATE[name], **{other: STATE[other] for other in rest}}
    with pytest.raises(TicketfindError, match=rf"missing: {name}; unexpected: module\.{name}"):
        match(mixed)


def test_a_tied_entry_may_stand_once():
    wanted = {"embed.weight": torch.ones(2, 3), "head.weight": torch.ones(2, 3)}
    for held in wanted:
        found = checkpoint.match(
            {held: torch.full((2, 3), 5.0)},
            wanted,
            allow=(),
            path=Path("w.pt"),
            aliases={"head.weight": "embed.weight"},
        )
        assert all(bool((found[name] == 5).all()) for name in wanted)


def test_tied_entries_that_differ_in_the_file_stay_what_they_are():
    held = {name: torch.full((2, 3), value) for name, value in (("embed.weight", 5.0), ("head.weight", 6.0))}
    found = checkpoint.match(held, held, allow=(), path=Path("w.pt"), aliases={"head.weight": "embed.weight"})
    assert same(found, held)


def test_weights_come_in_the_models_dtypes_and_order():
    found = match({name: STATE[name].half() for name in reversed(STATE)})
    assert same(found)
    assert [*found] == [*STATE]
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_everything_that_does_not_fit_is_listed_by_name():
    weights = {"fc.weight": torch.zeros(5, 3), "head.weight": torch.zeros(1), "head.bias": torch.zeros(1)}
    with pytest.raises(TicketfindError) as error:
        match(weights)
    assert str(error.value) == (
        "checkpoint w.pt: does not fit the model; missing: fc.bias; unexpected: head.weight, head.bias;"
        " other shape: fc.weight (2, 3) in the model, (5, 3) in the file (--allow-mismatch GLOB accepts entries)"
    )


def test_long_lists_are_cut():
    with pytest.raises(TicketfindError, match=r"unexpected: x0, x1, x2, x3, x4, x5, x6, x7 and 12 more"):
        match({**STATE, **{f"x{i}": torch.zeros(1) for i in range(20)}})


def test_allowed_mismatches_keep_the_models_own_start():
    weights = {"fc.weight": torch.zeros(5, 3), "fc.bias": STATE["fc.bias"], "head.weight": torch.zeros(1)}
    assert same(match(weights, allow=["fc.w*", "head.*"]), {"fc.bias": STATE["fc.bias"]})
    with pytest.raises(TicketfindError, match=r"the model; unexpected: head\.weight \("):
        match(weights, allow=["fc.w*"])


def test_allowed_entries_that_fit_are_used():
    assert same(match(STATE, allow=["*"]))
    assert same(match({"fc.bias": STATE["fc.bias"]}, allow=["fc.weight"]), {"fc.bias": STATE["fc.bias"]})


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int8), "other type: fc.weight float32 in the model, int8 in the file"),
        (torch.zeros(2, 3, dtype=torch.complex64), "other type: fc.weight float32 in the model, complex64 in the file"),
        (torch.full((2, 3), torch.nan, dtype=torch.bfloat16), "NaN: fc.weight ("),
    ],
)
def test_numbers_that_are_no_weights_are_refused(weight, message):
    with pytest.raises(TicketfindError) as error:
        match({**STATE, "fc.weight": weight})
    assert message in str(error.value)
    assert same(match({**STATE, "fc.weight": weight}, allow=["fc.weight"]), {"fc.bias": STATE["fc.bias"]})


def test_infinite_entries_are_weights():
    """Attention masks are buffers with -inf."""
    assert match({**STATE, "fc.bias": torch.tensor([-torch.inf, 0.0])})["fc.bias"].tolist() == [-torch.inf, 0.0]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_every_float_becomes_the_models(kind):
    state = {name: value.to(kind) for name, value in STATE.items()}
    found = match(state)
    assert all(torch.equal(found[name], value.float()) for name, value in state.items())
    assert checkpoint.dtype(state) == str(kind).removeprefix("torch.")


# ------------------------------------------------------------------------------- one of several sets of weights

EMA = {name: -value for name, value in STATE.items()}


@pytest.mark.parametrize(
    ("saved", "key"),
    [
        ({"state_dict": STATE, "state_dict_ema": EMA}, "state_dict_ema"),
        ({"model": STATE, "ema": {"model": EMA, "decay": 0.9}}, "ema"),
        ({"model": STATE, "ema": {"model": EMA, "decay": 0.9}}, "ema.model"),
        ({"model": STATE, "averaged": {"slow": EMA, "fast": STATE}}, "averaged.slow"),
        ({**{f"raw.{n}": v for n, v in STATE.items()}, **{f"ema.{n}": v for n, v in EMA.items()}}, "ema"),
        ({**{f"ema_2.{n}": v for n, v in STATE.items()}, **{f"ema.{n}": v for n, v in EMA.items()}}, "ema"),
    ],
)
def test_a_key_names_the_weights(tmp_path, saved, key):
    torch.save(saved, tmp_path / "w.pt")
    assert same(checkpoint.read(tmp_path / "w.pt", key), EMA)


def test_a_key_in_safetensors_is_a_prefix(tmp_path):
    save_file({f"ema.{name}": value for name, value in EMA.items()} | STATE, tmp_path / "w.safetensors")
    assert same(checkpoint.read(tmp_path / "w.safetensors", "ema"), EMA)


def test_a_wrong_key_lists_what_is_there(tmp_path):
    torch.save({"state_dict": STATE, "averaged": {"slow": EMA}, "epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(TicketfindError) as error:
        checkpoint.read(tmp_path / "w.pt", "averaged.slaw")
    assert str(error.value) == (
        f"checkpoint {tmp_path}/w.pt: checkpoint_key 'averaged.slaw': expected an entry that holds tensors,"
        " found state_dict, averaged.slow; did you mean averaged.slow?"
    )
    save_file({f"ema.{name}": value for name, value in EMA.items()}, tmp_path / "w.safetensors")
    with pytest.raises(TicketfindError, match=r"expected an entry that holds tensors, found ema; did you mean ema\?"):
        checkpoint.read(tmp_path / "w.safetensors", "emo")


def test_a_shard_that_lacks_what_the_index_promises(tmp_path):
    index = sharded(tmp_path)
    save_file({"other": STATE["fc.bias"]}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(TicketfindError, match=r"missing: fc\.bias; unexpected: other"):
        match(checkpoint.read(index))
