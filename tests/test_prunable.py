import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from ticketfind import TicketfindError, masks, prunable


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(2, 3), nn.Conv2d(1, 2, 3)
        self.transposed = nn.ConvTranspose1d(1, 2, 3, bias=False)
        self.bn, self.ln = nn.BatchNorm1d(3), nn.LayerNorm(3)
        self.embedding = nn.Embedding(5, 4)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.cross = nn.MultiheadAttention(4, 2, kdim=3, vdim=3, bias=False)
        self.lstm, self.prelu = nn.LSTM(2, 2), nn.PReLU()
        self.own = nn.Parameter(torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("name", "pruned", "reason"),
    [
        ("linear.weight", True, "Linear weight"),
        ("linear.bias", False, "bias"),
        ("conv.weight", True, "Conv2d weight"),
        ("transposed.weight", True, "ConvTranspose1d weight"),
        ("bn.weight", False, "normalization"),
        ("bn.bias", False, "bias"),
        ("ln.weight", False, "normalization"),
        ("embedding.weight", False, "embedding"),
        ("attention.in_proj_weight", True, "attention weight"),
        ("attention.in_proj_bias", False, "bias"),
        ("attention.out_proj.weight", True, "NonDynamicallyQuantizableLinear weight"),
        ("attention.bias_k", False, "bias"),
        ("cross.q_proj_weight", True, "attention weight"),
        ("cross.k_proj_weight", True, "attention weight"),
        ("cross.v_proj_weight", True, "attention weight"),
        ("lstm.weight_hh_l0", True, "LSTM weight"),
        ("prelu.weight", False, "PReLU.weight is not a Linear, Conv or attention weight"),
        ("own", False, "Zoo.own is not a Linear, Conv or attention weight"),
    ],
)
def test_each_parameter_is_pruned_or_not_for_a_reason(name, pruned, reason):
    found = {c.name: (c.pruned, c.reason) for c in prunable.candidates(Zoo())}
    assert found[name] == (pruned, reason)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(2, 2, 2), nn.Conv2d(2, 2, 2), nn.Conv3d(2, 2, 2), nn.Bilinear(2, 2, 2),
        nn.ConvTranspose1d(2, 2, 2), nn.ConvTranspose2d(2, 2, 2), nn.ConvTranspose3d(2, 2, 2),
        nn.RNN(2, 2), nn.GRU(2, 2, num_layers=2), nn.LSTM(2, 4, proj_size=2), nn.RNNCell(2, 2), nn.LSTMCell(2, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_the_weights_of_every_kind_of_layer_are_pruned_and_no_bias(layer):
    found = {c.name: c.pruned for c in prunable.candidates(layer)}
    assert found == {name: "bias" not in name for name, _ in layer.named_parameters()}


def test_candidates_are_all_parameters_with_their_shapes_in_order():
    zoo = Zoo()
    assert [(c.name, c.shape) for c in prunable.candidates(zoo)] == [
        (n, tuple(p.shape)) for n, p in zoo.named_parameters()
    ]


def test_only_and_skip():
    found = {c.name: c for c in prunable.candidates(Zoo(), only=["lstm.*", "linear.weight"], skip=["lstm.bias*"])}
    assert [name for name, c in found.items() if c.pruned] == [
        "linear.weight",
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
    ]
    assert found["conv.weight"].reason == "not in prune.only"
    assert found["lstm.bias_ih_l0"].reason == "matches prune.skip"


@pytest.mark.parametrize("key", ["only", "skip"])
def test_a_glob_that_matches_nothing_is_an_error(key):
    with pytest.raises(TicketfindError, match=rf"prune\.{key}: 'Linear\*' matches nothing; there are own, linear"):
        prunable.candidates(Zoo(), **{key: ["Linear*"]})  # case matters


def test_frozen_parameters_stay_whole_unless_asked_for():
    model = nn.Linear(3, 3)
    model.weight.requires_grad_(False)
    weight, _ = prunable.candidates(model)
    assert (weight.pruned, weight.reason) == (False, "frozen")
    assert prunable.candidates(model, only=["weight"])[0].pruned


def test_a_tied_weight_can_be_skipped_by_either_name():
    model = tied(nn.Linear(4, 4), nn.Linear(4, 4))
    for name in ("a.weight", "b.weight"):
        assert not prunable.candidates(model, skip=[name])[0].pruned


def tied(first, second):
    model = nn.ModuleDict({"a": first, "b": second})
    model["b"].weight = model["a"].weight
    return model


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (tied(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)), (True, "Linear weight")),
        (tied(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)), (False, "embedding")),
        (tied(nn.Linear(4, 4, bias=False), nn.Embedding(4, 4)), (False, "embedding")),
    ],
    ids=["two linear", "embedding first", "embedding last"],
)
def test_tied_weights_are_one_parameter(model, expected):
    assert [(c.name, c.pruned, c.reason) for c in prunable.candidates(model)] == [("a.weight", *expected)]
    assert prunable.aliases(model) == {"b.weight": "a.weight"}


def test_no_aliases_without_tied_weights():
    assert prunable.aliases(Zoo()) == {}


def test_a_fraction_for_nothing_is_an_error():
    with pytest.raises(TicketfindError, match=r"prune\.fraction: 'head\.\*' matches nothing; there are conv1"):
        prunable.check_globs({"*": 0.2, "head.*": 0.1}, ["conv1.weight", "fc.weight"], "prune.fraction")


# -------------------------------------------------------------------------------- weights made from others


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).T


def old_norm(module, name="weight"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, name)


def torch_pruned(module):
    prune.random_unstructured(module, "weight", 0.5)
    return module


@pytest.mark.parametrize(
    ("model", "pruned"),
    [
        (lambda: parametrizations.weight_norm(nn.Linear(5, 4)), ["parametrizations.weight.original1"]),
        (lambda: parametrizations.weight_norm(nn.Linear(5, 1)), ["parametrizations.weight.original1"]),
        (lambda: parametrizations.weight_norm(nn.Linear(1, 5)), ["parametrizations.weight.original0"]),  # the lengths
        (lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3), dim=1), ["parametrizations.weight.original1"]),
        (lambda: parametrizations.weight_norm(nn.Linear(5, 4), dim=None), ["parametrizations.weight.original1"]),
        (lambda: parametrizations.spectral_norm(nn.Linear(5, 4)), ["parametrizations.weight.original"]),
        (lambda: parametrizations.orthogonal(nn.Linear(5, 4)), []),
        (lambda: parametrize.register_parametrization(nn.Linear(4, 4), "weight", Symmetric()), []),
        (lambda: parametrizations.weight_norm(nn.LSTM(5, 5), "weight_hh_l0"),
         ["weight_ih_l0", "parametrizations.weight_hh_l0.original1"]),
        (lambda: old_norm(nn.LSTM(5, 5), "weight_hh_l0"), ["weight_ih_l0", "weight_hh_l0_v"]),
        (lambda: old_norm(nn.Conv1d(3, 4, 2)), ["weight_v"]),
        (lambda: nn.utils.spectral_norm(nn.Linear(5, 4)), ["weight_orig"]),
        (lambda: torch_pruned(nn.Linear(5, 4)), ["weight_orig"]),
    ],
)  # fmt: skip
def test_what_a_layer_computes_its_weight_from_is_pruned_where_zeros_stay(model, pruned):
    assert [c.name for c in prunable.candidates(model()) if c.pruned] == pruned


@pytest.mark.parametrize(
    ("model", "name", "index", "lost"),
    [
        (lambda: parametrizations.weight_norm(nn.Linear(5, 4)), "parametrizations.weight.original1", (2,), True),
        (lambda: parametrizations.weight_norm(nn.Linear(5, 4)), "parametrizations.weight.original1", (..., 2), False),
        (lambda: parametrizations.weight_norm(nn.Conv1d(3, 4, 2), dim=1), "parametrizations.weight.original1",
         (slice(None), 1), True),
        (lambda: parametrizations.weight_norm(nn.Conv1d(3, 4, 2), dim=1), "parametrizations.weight.original1",
         (1,), False),
        (lambda: old_norm(nn.Conv1d(3, 4, 2)), "weight_v", (3,), True),
        (lambda: old_norm(nn.Linear(5, 4)), "weight_v", (..., 0), False),
        (lambda: nn.Linear(5, 4), "weight", (2,), False),
    ],
)  # fmt: skip
def test_a_direction_without_length_is_found_before_it_gives_nan(model, name, index, lost):
    net = model()
    mask = torch.ones_like(dict(net.named_parameters())[name], dtype=torch.bool)
    mask[index] = False
    state = masks.masked(net.state_dict(), {name: mask})
    assert prunable.without_direction({name: mask}, state) == ([name] if lost else [])
    net.load_state_dict(state)
    wide = net.in_features if isinstance(net, nn.Linear) else net.in_channels
    outputs = net(torch.ones(2, wide, 3) if isinstance(net, nn.Conv1d) else torch.ones(2, wide))
    assert bool(outputs.isnan().any()) is lost
