import sys

import pytest
import timm
import torch
from torch import nn

from ticketfind import TicketfindError, models

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
