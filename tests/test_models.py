import json
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from ticketfind import TicketfindError, load_ticket, masks, models
from ticketfind.outputs import predictions
from ticketfind.specs import load_object

USER = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=4, in_chans=3, width=8, **others):
        super().__init__()
        self.others = others
        self.body = nn.Linear(in_chans, width)
        self.head = nn.Linear(width, num_classes)

def plain(): return nn.Linear(5, 2)
def sized(input_shape, num_classes): return nn.Linear(input_shape[-1], num_classes)
def stochastic(): return nn.Sequential(nn.Linear(5, 5), nn.Dropout(torch.rand(()).item()))
def anything(**kwargs): return nn.Linear(1 + len(kwargs), 1)
def none(): return None
def fails(width=3): raise ValueError("width\\n  too small")
made = nn.Linear(3, 2)
number = 3
"""


@pytest.fixture(autouse=True)
def _same_path_afterwards(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def user(tmp_path):
    (tmp_path / "user.py").write_text(USER)
    return f"{tmp_path}/user.py"


def new(spec, args=None, input_shape=(3, 32, 32), classes=7, seed=0):
    example = None if input_shape is None else torch.zeros(2, *input_shape)
    return models.source(spec, args or {}, example=example, outputs=classes).new(seed)


def shapes(model):
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


# ---------------------------------------------------------------------------------------- sized for the data


def test_a_built_in_net_follows_the_data_unless_told_otherwise():
    assert shapes(new("lenet-300-100", input_shape=(1, 8, 8)))["fc1.weight"] == (300, 64)
    assert shapes(new("lenet-300-100"))["fc3.weight"] == (7, 100)
    assert shapes(new("lenet-300-100", {"num_classes": 2}))["fc3.weight"] == (2, 100)
    assert shapes(new("lenet-300-100", input_shape=None, classes=None))["fc1.weight"] == (300, 784)


@pytest.mark.parametrize("spec", ["resnet10t", "timm:resnet10t"])
def test_a_timm_net_follows_the_data_unless_told_otherwise(spec):
    model = new(spec, input_shape=(1, 16, 16))
    with torch.no_grad():
        assert model.eval()(torch.zeros(2, 1, 16, 16)).shape == (2, 7)
    found = shapes(new(spec, {"num_classes": 2, "stem_width": 16}, input_shape=(5, 16, 16)))
    assert (found["fc.weight"][0], found["conv1.0.weight"][1]) == (2, 5)
    assert shapes(new(spec, input_shape=None, classes=None)) == shapes(timm.create_model("resnet10t"))


def test_a_timm_net_of_fixed_input_size_gets_the_datas():
    tiny = {"depth": 1, "embed_dim": 24, "num_heads": 3, "patch_size": 8}
    model = new("vit_tiny_patch16_224", tiny, input_shape=(3, 32, 16))
    assert model.pos_embed.shape == (1, 4 * 2 + 1, 24)


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("Net", {}, {"body.weight": (8, 3), "head.weight": (7, 8)}),
        ("Net", {"width": 2, "num_classes": 5}, {"body.weight": (2, 3), "head.weight": (5, 2)}),
        ("plain", {}, {"weight": (2, 5)}),  # takes nothing, gets nothing
        ("sized", {}, {"weight": (7, 32)}),
        ("anything", {"a": 1}, {"weight": (1, 2)}),  # **kwargs are not filled up
        ("made", {}, {"weight": (2, 3)}),
    ],
)
def test_a_factory_of_the_users_gets_what_it_names(user, name, args, expected):
    found = shapes(new(f"{user}:{name}", args))
    assert {key: found[key] for key in expected} == expected


def test_a_module_that_can_be_imported():
    assert isinstance(new("torch.nn:Linear", {"in_features": 2, "out_features": 3}), nn.Linear)


# -------------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize("spec", ["lenet-300-100", "resnet10t", "user:Net", "user:stochastic"])
def test_the_same_seed_gives_the_same_weights_and_torchs_generator_is_left_alone(spec, user):
    source = models.source(spec.replace("user", user), {}, example=torch.zeros(2, 1, 16, 16), outputs=3)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    a, b, c = (models.state_of(source.new(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[name], b[name]) for name in a)
    weights = [name for name in a if a[name].ndim > 1]
    assert not any(torch.equal(a[name], c[name]) for name in weights)


def test_an_instance_is_copied_with_its_weights(user):
    source = models.source(f"{user}:made", {})
    first, second = source.new(0), source.new(1)
    assert torch.equal(first.weight, second.weight)
    with torch.no_grad():
        first.weight.zero_()
    assert second.weight.any() and source.new(2).weight.any()


def test_state_is_a_copy_of_parameters_and_buffers():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    state = models.state_of(model)
    assert state.keys() == model.state_dict().keys()
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].running_mean += 1
    assert state["0.weight"].any() and not state["1.running_mean"].any()
    assert not any(value.requires_grad for value in state.values())


def test_pretrained_weights_are_kept_and_a_new_head_is_drawn_from_the_seed(tmp_path):
    """As `--model resnet10t --model-arg pretrained=true`, with a local file in the place of a download."""
    torch.manual_seed(3)
    saved = timm.create_model("resnet10t", num_classes=1000).state_dict()
    torch.save(saved, tmp_path / "r.pth")
    args = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "r.pth")}}
    before = torch.get_rng_state()
    source = models.source("resnet10t", args, example=torch.zeros(2, 3, 32, 32), outputs=7)
    assert torch.equal(torch.get_rng_state(), before)
    assert source.pretrained is not None
    assert "fc.weight" not in source.pretrained
    assert source.pretrained.keys() >= saved.keys() - {"fc.weight", "fc.bias"}
    assert all(torch.equal(v, saved[name]) for name, v in source.pretrained.items() if not name.startswith("fc."))
    assert not torch.equal(source.new(0).fc.weight, source.new(1).fc.weight)


# -------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet10", "model 'resnet10': expected a timm name, lenet-300-100, conv-2"),
        ("resnet10", "did you mean resnet10t"),
        ("lenet-300", "did you mean lenet-300-100"),
        ("timm:xyzzy", "model 'timm:xyzzy': expected a timm name"),
        ("user:none", "user:none': expected an nn.Module, found NoneType"),
        ("user:fails", "user:fails': building it with no arguments failed: ValueError: width too small"),
        ("user:number", "user:number': expected a class or function, found int"),
        ("user:Nte", "has no 'Nte'; did you mean Net"),
        ("gone.py:Net", "gone.py: no such file"),
    ],
)
def test_models_that_cannot_be_made_are_named(user, spec, message):
    with pytest.raises(TicketfindError) as error:
        new(spec.replace("user:", f"{user}:"))
    assert message.replace("user:", f"{user}:") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "args", "message"),
    [
        ("lenet-300-100", {"width": 3}, r"building it with num_classes=7, input_shape=.*, width=3 failed: TypeError"),
        ("resnet10t", {"no_such": 3}, r"building it with .*no_such=3 failed: TypeError"),
        ("user:fails", {"width": "x"}, r"building it with width='x' failed: ValueError"),
    ],
)
def test_arguments_that_a_factory_refuses_are_shown(user, spec, args, message):
    with pytest.raises(TicketfindError, match=message):
        new(spec.replace("user:", f"{user}:"), args)


# ------------------------------------------------------------- layers that others have to be told about


LAYERS = """
import threading
import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, weight_norm

class Lazy(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv, self.norm, self.head = nn.LazyConv2d(width, 3), nn.LazyBatchNorm2d(), nn.LazyLinear(3)
    def forward(self, x): return self.head(F.relu(self.norm(self.conv(x))).flatten(1))

lazy, kept = Lazy(), Lazy()
def cached(): return kept

class Uncopied(nn.Linear):
    def __init__(self):
        super().__init__(12, 3)
        self.lock = threading.Lock()

class Parametrized(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.body = getattr(parametrizations, by)(nn.Linear(12, 16))
        self.head = nn.Linear(16, 3)
    def forward(self, x): return self.head(F.relu(self.body(x)))

def old(module, name="weight"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return weight_norm(module, name)

class Old(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = old(nn.Linear(12, 16)), nn.Linear(16, 3)
    def forward(self, x): return self.head(F.relu(self.body(x)))

class OldRecurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = old(nn.GRU(4, 6, batch_first=True), "weight_hh_l0"), nn.Linear(6, 3)
    def forward(self, x): return self.head(self.body(x.view(-1, 3, 4))[0][:, -1])

class Tokens(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embed, self.kind, self.head = nn.Embedding(12, 8), kind, nn.Linear(8, 3)
        if kind in ("LSTM", "GRU", "RNN"):
            self.body = getattr(nn, kind)(8, 8, batch_first=True)
        elif kind == "normed LSTM":
            self.body = parametrizations.weight_norm(nn.LSTM(8, 8, batch_first=True), "weight_hh_l0")
        elif kind == "attention":
            self.body = nn.MultiheadAttention(8, 2, batch_first=True)
        elif kind == "cross attention":
            self.memory, self.body = nn.Linear(8, 6), nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
        else:
            self.body = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    def forward(self, x):
        x = self.embed(x)
        if self.kind == "attention":
            x, _ = self.body(x, x, x)
        elif self.kind == "cross attention":
            x, _ = self.body(x, self.memory(x), self.memory(x))
        elif self.kind == "transformer":
            x = self.body(x)
        else:
            x, _ = self.body(x)
        return self.head(x[:, -1])

class Cell(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body, self.head = getattr(nn, kind)(12, 8), nn.Linear(8, 3)
    def forward(self, x):
        state = self.body(x)
        return self.head(state[0] if isinstance(state, tuple) else state)

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.decode.weight = self.encode.weight
    def forward(self, x): return self.head(F.relu(self.decode(F.relu(self.encode(x)))))

class Convolved(nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.body = getattr(nn, f"Conv{dims}d")(2, 8, 3)
        self.head = nn.Linear(8, 3)
    def forward(self, x): return self.head(F.relu(self.body(x)).flatten(2).mean(-1))

class Plain(nn.Module):
    def __init__(self, outputs=3, kind=None, half=False):
        super().__init__()
        self.body, self.head, self.kind = nn.Linear(12, 16), nn.Linear(16, outputs), kind
        if half:
            self.to(torch.bfloat16)
    def forward(self, x, labels=None):
        out = self.head(F.relu(self.body(x)))
        if self.kind == "tuple":
            return out, None
        if self.kind == "dict":
            return {"hidden": x, "logits": out}
        if self.kind == "object":
            return Output(out)
        return out.squeeze(-1) if self.kind == "squeezed" else out

class Output:
    def __init__(self, logits): self.logits = logits

def one_shape(*shape):
    generator = torch.Generator().manual_seed(0)
    centers, labels = torch.randn(3, *shape, generator=generator), torch.arange(60) % 3
    inputs = centers[labels] + torch.randn(60, *shape, generator=generator)
    return (inputs[:40], labels[:40]), (inputs[40:], labels[40:])

def flat(): return one_shape(12)
def lines(): return one_shape(2, 9)
def images(): return one_shape(2, 6, 6)
def volumes(): return one_shape(2, 4, 4, 4)
def tokens(): return tuple(((x[:, :7].abs() * 4).long().clamp(max=11), y) for x, y in flat())
def sums(): return tuple((x, x.sum(1)) for x, _ in flat())
def parts(): return tuple((x, x[:, :3].clone()) for x, _ in flat())
def signs(): return tuple((x, (x[:, :3] > 0).float()) for x, _ in flat())

def closeness(outputs, targets): return -F.mse_loss(outputs, targets)
def agreement(outputs, targets): return ((outputs > 0) == (targets > 0)).float().mean()
"""


@pytest.fixture
def layers_py(tmp_path):
    (tmp_path / "layers.py").write_text(LAYERS)
    return f"{tmp_path}/layers.py"


@pytest.mark.parametrize("name", ["Lazy", "lazy", "cached"])
def test_lazy_layers_take_their_sizes_from_the_data(layers_py, name):
    source = models.source(f"{layers_py}:{name}", {}, example=torch.zeros(2, 5, 8, 8), outputs=None)
    first, again, other = source.new(1), source.new(1), source.new(2)
    assert shapes(first)["conv.weight"] == (8, 5, 3, 3) and shapes(first)["head.weight"] == (3, 8 * 6 * 6)
    for key, value in models.state_of(first).items():
        assert torch.equal(value, models.state_of(again)[key])
    assert not torch.equal(first.head.weight, other.head.weight)
    assert int(first.norm.num_batches_tracked) == 0 and first.training


def test_lazy_layers_without_data_are_an_error(layers_py):
    with pytest.raises(TicketfindError, match=r"model: conv.weight takes its size .*, and there are none; give --data"):
        new(f"{layers_py}:Lazy", input_shape=None)
    with pytest.raises(TicketfindError, match=r"sizing conv.weight by the data's inputs failed: RuntimeError"):
        new(f"{layers_py}:Lazy", input_shape=(3,))


def test_a_module_that_cannot_be_copied_is_named(layers_py):
    with pytest.raises(
        TicketfindError, match=r"expected a module that copy.deepcopy can copy, found Uncopied: TypeErr"
    ):
        new(f"{layers_py}:Uncopied")


def test_half_precision_is_trained_in_float32(layers_py):
    assert {p.dtype for p in new(f"{layers_py}:Plain", {"half": True}).parameters()} == {torch.float32}


# ------------------------------------------------------------------------- whole searches, as a user types them

SEARCH = ["--iterations", "9", "--batch-size", "8", "--rounds", "2", "--prune", "0.4", "--rewind", "2it", "--json",
          "--replicates", "1", "--engine", "eager", "--set", "train.eval_every=9", "--tolerance", "100"]  # fmt: skip
REGRESSION = ["--loss", "torch.nn.functional:mse_loss", "--metric", "layers.py:closeness"]
MULTILABEL = ["--loss", "torch.nn.functional:binary_cross_entropy_with_logits", "--metric", "layers.py:agreement"]


@pytest.mark.parametrize(
    ("name", "args", "data", "more", "masked"),
    [
        ("Lazy", {"width": 6}, "images", [], ["conv.weight", "head.weight"]),
        ("Parametrized", {"by": "weight_norm"}, "flat", [], ["body.parametrizations.weight.original1", "head.weight"]),
        ("Parametrized", {"by": "spectral_norm"}, "flat", [], ["body.parametrizations.weight.original", "head.weight"]),
        ("Parametrized", {"by": "orthogonal"}, "flat", [], ["head.weight"]),  # no zeros in it
        ("Old", {}, "flat", [], ["body.weight_v", "head.weight"]),
        ("OldRecurrent", {}, "flat", ["--prune", "0.2"], ["body.weight_hh_l0_v", "body.weight_ih_l0", "head.weight"]),
        ("Tokens", {"kind": "LSTM"}, "tokens", [], ["body.weight_hh_l0", "body.weight_ih_l0", "head.weight"]),
        ("Tokens", {"kind": "GRU"}, "tokens", ["--skip", "*_hh_*"], ["body.weight_ih_l0", "head.weight"]),
        ("Tokens", {"kind": "RNN"}, "tokens", ["--prune-only", "embed.*"], ["embed.weight"]),
        ("Tokens", {"kind": "normed LSTM"}, "tokens", ["--prune", "0.2"],
         ["body.parametrizations.weight_hh_l0.original1", "body.weight_ih_l0", "head.weight"]),
        ("Tokens", {"kind": "attention"}, "tokens", [], ["body.in_proj_weight", "body.out_proj.weight", "head.weight"]),
        ("Tokens", {"kind": "cross attention"}, "tokens", ["--scope", "layer"],
         [*(f"body.{p}_proj_weight" for p in "kqv"), "body.out_proj.weight", "head.weight", "memory.weight"]),
        ("Tokens", {"kind": "transformer"}, "tokens", [],
         ["body.linear1.weight", "body.linear2.weight", "body.self_attn.in_proj_weight",
          "body.self_attn.out_proj.weight", "head.weight"]),
        ("Cell", {"kind": "LSTMCell"}, "flat", [], ["body.weight_hh", "body.weight_ih", "head.weight"]),
        ("Cell", {"kind": "GRUCell"}, "flat", [], ["body.weight_hh", "body.weight_ih", "head.weight"]),
        ("Tied", {}, "flat", [], ["encode.weight", "head.weight"]),
        ("Convolved", {"dims": 1}, "lines", [], ["body.weight", "head.weight"]),
        ("Convolved", {"dims": 3}, "volumes", ["--prune", "*=0.3", "--prune", "head.*=0"],
         ["body.weight", "head.weight"]),
        ("Plain", {"kind": "tuple"}, "flat", [], ["body.weight", "head.weight"]),
        ("Plain", {"kind": "dict"}, "flat", [], ["body.weight", "head.weight"]),
        ("Plain", {"kind": "object"}, "flat", [], ["body.weight", "head.weight"]),
        ("Plain", {"half": True}, "flat", [], ["body.weight", "head.weight"]),
        ("Plain", {"outputs": 3}, "parts", REGRESSION, ["body.weight", "head.weight"]),
        ("Plain", {"outputs": 1, "kind": "squeezed"}, "sums", REGRESSION, ["body.weight", "head.weight"]),
        ("Plain", {"outputs": 3}, "signs", MULTILABEL, ["body.weight", "head.weight"]),
    ],
)  # fmt: skip
def test_a_search_ends_with_exact_zeros_and_a_ticket_for_a_fresh_model(
    layers_py, command, name, args, data, more, masked
):
    spec = f"{layers_py}:{name}"
    given = [word for key, value in args.items() for word in ("--model-arg", f"{key}={json.dumps(value)}")]
    found = command("search", "--model", spec, *given, "--data", f"layers.py:{data}", *SEARCH, *more).json
    assert [entry["round"] for entry in found["rounds"]] == [0, 1, 2]
    command("export", "--round", "2", "-o", "t.safetensors")
    ticket = load_ticket("t.safetensors")
    assert {*ticket.masks} == {*masked}
    assert masks.remaining(ticket.masks) == found["rounds"][2]["remaining"] < 0.7

    example = batch_of(layers_py, data)
    model = models.source(spec, args, example=example, outputs=None).new(77)
    ticket.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    ticket.hold(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        predictions(model(example)).square().mean().backward()
        optimizer.step()
    parameters = dict(model.named_parameters())
    for key, mask in ticket.masks.items():
        assert not parameters[key][~mask].any() and parameters[key][mask].any()
        effective = effective_weight(model, key)
        assert effective.shape == mask.shape and not effective[~mask].any() and effective[mask].all()


def batch_of(layers_py, data):
    return load_object(f"{layers_py}:{data}", "data")()[0][0][:8]


def effective_weight(model, key):
    """What the layer multiplies with, where that is not the parameter itself."""
    place, _, last = key.rpartition(".")
    if last in ("original", "original1"):
        place, _, last = place.replace("parametrizations.", "").rpartition(".")
    return getattr(model.get_submodule(place), last.removesuffix("_v"))


def test_tied_weights_are_one_mask_in_every_file(layers_py, command):
    assert command("search", "--model", "layers.py:Tied", "--data", "layers.py:flat", *SEARCH).code == 0
    for form in ("ticket", "compact", "dense", "torch-prune"):
        assert command("export", "--round", "2", "--format", form, "-o", f"{form}.safetensors").code == 0
    ticket, compact = load_ticket("ticket.safetensors"), load_ticket("compact.safetensors")
    mask = ticket.masks["encode.weight"]
    assert ticket.about.aliases == compact.about.aliases == {"decode.weight": "encode.weight"}
    dense = load_file("dense.safetensors")
    assert torch.equal(dense["decode.weight"], dense["encode.weight"]) and not dense["decode.weight"][~mask].any()
    model, same = new(f"{layers_py}:Tied"), new(f"{layers_py}:Tied")
    ticket.apply(model)
    same.load_state_dict(dense)
    assert model.decode.weight is model.encode.weight
    assert torch.equal(model.encode.weight, same.encode.weight) and torch.equal(
        model.encode.weight, dense["encode.weight"]
    )
    compact.apply(same)
    assert torch.equal(same.decode.weight, dense["encode.weight"])
    pruned = load_file("torch-prune.safetensors")
    assert torch.equal(pruned["decode.weight_orig"] * pruned["decode.weight_mask"], dense["decode.weight"])
    judged = command("eval", "ticket.safetensors", "--trust", "--trials", "2", "--json").json
    assert judged["arms"]["ticket"]["replicates"] == 2


@pytest.mark.parametrize("name", ["Parametrized", "Old"])
def test_a_weight_norm_that_would_divide_by_zero_is_named(layers_py, command, name):
    given = ["--model-arg", "by=weight_norm"] if name == "Parametrized" else []
    words = ["search", "--model", f"layers.py:{name}", *given, "--data", "layers.py:flat", *SEARCH, "--prune", "0.9"]
    done = command(*words)
    assert done.code == 1 and "Traceback" not in done.err
    assert "a whole row of body." in done.err and "is pruned, whose length weight_norm divides by" in done.err
    assert command(*words, "--skip", "body.*", "--out", "other").code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "layers.py:Plain", "--model-arg", "outputs=1", "--data", "layers.py:sums", *REGRESSION],
         "failed on outputs ([2, 1] float32) and targets ([2] float32): UserWarning: Using a target size"),
        (["--model", "layers.py:Plain", "--model-arg", "widht=1", "--data", "layers.py:flat"],
         "building it with widht=1 failed: TypeError: Plain.__init__() got an unexpected keyword argument 'widht'"),
        (["--model", "torch.nn:LayerNorm", "--model-arg", "normalized_shape=12", "--data", "layers.py:flat"],
         "expected a parameter to prune, found none"),
        (["--model", "torch.nn:Identity", "--data", "layers.py:flat"], "expected a parameter to prune, found none"),
        (["--model", "layers.py:Convolved", "--model-arg", "dims=2", "--data", "layers.py:flat"],
         "cannot take layers.py:flat's inputs ([2, 12] float32): RuntimeError"),
        (["--model", "layers.py", "--data", "layers.py:flat"], "module:factory or file.py:factory"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_one_line(layers_py, command, words, message):
    done = command("search", *words, *SEARCH)
    assert done.code == 1 and message in done.err
    assert done.err.startswith("error: ") and done.err.count("\n") == 1


def test_a_method_chain_of_a_package_on_the_current_path(tmp_path, command):
    (tmp_path / "hub42").mkdir()
    (tmp_path / "hub42" / "__init__.py").write_text("from .auto import AutoModel\n")
    (tmp_path / "hub42" / "auto.py").write_text(
        "from torch import nn\n"
        "class AutoModel:\n"
        "    @classmethod\n"
        "    def from_config(cls, hidden, num_classes=2):\n"
        "        return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))\n"
    )
    words = ["--model", "hub42:AutoModel.from_config", "--model-arg", "hidden=6", "--data", "digits", *SEARCH]
    assert [entry["round"] for entry in command("search", *words).json["rounds"]] == [0, 1, 2]
    (run,) = tmp_path.glob("runs/hub42*digits")
    assert load_file(run / "init" / "0.safetensors")["3.weight"].shape == (10, 6)
