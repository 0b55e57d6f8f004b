"""Predictions in whatever a network returns; the default loss and metric against plain PyTorch and numpy."""

from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ticketfind import TicketfindError, outputs

SCORES = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3, 1, 1, 2, 0])
Pair = namedtuple("Pair", ["first", "second"])


class Output(OrderedDict):
    """As transformers returns: a dict with its entries as attributes too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@pytest.mark.parametrize(
    "returned",
    [
        SCORES,
        (SCORES, 3),
        [SCORES],
        Pair(SCORES, torch.zeros(2)),
        ((SCORES, None), torch.zeros(1)),
        {"logits": SCORES, "hidden": torch.zeros(6, 9)},
        {"out": SCORES, "aux": torch.zeros(6, 4)},
        {"anything": SCORES, "note": "no tensor"},
        SimpleNamespace(logits=SCORES, loss=None),
        Output(loss=torch.tensor(1.0), logits=SCORES),
        ({"logits": SCORES},),
    ],
)
def test_the_predictions_are_found(returned):
    assert outputs.predictions(returned) is SCORES


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "found NoneType; give --loss and --metric"),
        ((), "found tuple"),
        ("scores", "found str"),
        ({"a": SCORES, "b": SCORES}, "expected logits or out in the dict that it returns, found a, b;"),
        ({}, "expected logits or out in the dict that it returns, found none;"),
        (SimpleNamespace(logits=[1.0]), "found SimpleNamespace"),
    ],
)
def test_no_predictions_is_an_error_that_names_what_there_is(returned, message):
    with pytest.raises(TicketfindError) as error:
        outputs.predictions(returned)
    assert message in str(error.value)


def test_inputs_are_passed_by_place_or_by_name():
    model = nn.Bilinear(2, 3, 4)
    x, y = torch.ones(5, 2), torch.ones(5, 3)
    assert torch.equal(outputs.call(model, {"input2": y, "input1": x}), model(x, y))
    assert torch.equal(outputs.call(nn.Flatten(), x), x)


def test_the_networks_own_loss_counts():
    own = torch.tensor(7.0)
    for returned in ({"loss": own, "logits": SCORES}, SimpleNamespace(loss=own, logits=SCORES)):
        assert outputs.cross_entropy(returned, LABELS) is own
        assert outputs.accuracy(returned, LABELS) == (SCORES.argmax(1) == LABELS).double().mean()
    assert torch.equal(outputs.cross_entropy({"loss": None, "logits": SCORES}, LABELS), F.cross_entropy(SCORES, LABELS))


@pytest.mark.parametrize("layout", ["classes first", "classes last"])
@pytest.mark.parametrize("places", [(), (7,), (3, 5)])
@pytest.mark.parametrize("ignored", [False, True])
def test_loss_and_accuracy_of_every_place(layout, places, ignored):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(6, 4, *places, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 4, (6, *places), generator=generator)
    if ignored:
        targets[torch.rand(targets.shape, generator=generator) < 0.4] = outputs.IGNORED
    given = scores.movedim(1, -1) if layout == "classes last" else scores
    assert float(outputs.cross_entropy(given, targets)) == pytest.approx(float(F.cross_entropy(scores, targets)))
    counted = targets.numpy() != outputs.IGNORED
    right = np.argmax(scores.numpy(), 1) == targets.numpy()
    assert float(outputs.accuracy(given, targets)) == pytest.approx(right[counted].mean())
    assert int(outputs.counted(targets)) == counted.sum()


@pytest.mark.parametrize("places", [(7,), (3, 5)])
def test_a_batch_of_nothing_that_counts_is_zero_not_nan(places):
    targets = torch.full((2, *places), outputs.IGNORED)
    scores = torch.randn(2, 4, *places)
    assert (outputs.cross_entropy(scores, targets), outputs.accuracy(scores, targets)) == (0, 0)


@pytest.mark.parametrize(
    ("scores", "targets"),
    [((6,), (6,)), ((6, 1, 4), (6,)), ((5, 4), (6,)), ((6, 4, 3), (6, 7)), ((6, 4), (6, 4))],
)
def test_shapes_that_do_not_go_together_are_named(scores, targets):
    with pytest.raises(TicketfindError) as error:
        outputs.find_class_axis(torch.zeros(scores), torch.zeros(targets, dtype=torch.long))
    assert f"found outputs of shape {list(scores)} for targets of shape {list(targets)}" in str(error.value)


def test_shapes_that_do_not_tell_the_axis_are_refused_but_for_logits():
    """As many places as classes: read the wrong way round, nothing would look wrong."""
    scores = torch.randn(4, 5, 5)
    targets = scores.argmax(-1)
    with pytest.raises(TicketfindError, match="do not tell which axis the classes are on"):
        outputs.accuracy(scores, targets)
    assert outputs.accuracy({"logits": scores}, targets) == 1
    assert outputs.accuracy(scores, targets, class_axis=-1) == 1


def test_real_targets_count_by_example():
    assert outputs.counted(torch.zeros(5, 3)) == 5


@pytest.mark.parametrize("places", [(), (5,)])
def test_the_cross_entropy_of_rounded_predictions_is_not_rounded(places):
    """Autocast computes it in float32, on a CPU too, where it leaves a softmax in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 3, *places, generator=generator).bfloat16()
    targets = torch.randint(3, (6, *places), generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outputs.cross_entropy(scores, targets)
    exact = -torch.log_softmax(scores.double(), 1).gather(1, targets[:, None]).mean()
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(exact), rel=1e-6)
