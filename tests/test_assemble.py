import sys
from typing import Any

import pytest
import torch

from ticketfind import TicketfindError, assemble, models, scores
from ticketfind.connection import is_disconnected
from ticketfind.layers import from_layers, nested
from ticketfind.readers import Duration
from ticketfind.recipe import RecipeError

USER = """
import torch
from torch import nn

def pair(n): return torch.arange(64.0 * n).view(n, 1, 8, 8) / n, torch.arange(n) % 3
def images(): return pair(40), pair(9)
def values(): return tuple((x, y.float()[:, None]) for x, y in images())

class Net(nn.Module):
    def __init__(self, outputs=3):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm2d(1), nn.Linear(64, outputs)
    def forward(self, x): return self.fc(self.norm(x).flatten(1))

class Pair(Net):
    def forward(self, x): return super().forward(x), 1

class Draws(Net):
    def forward(self, x): return super().forward(x).unsqueeze(1)

def mse(outputs, targets): return ((outputs - targets) ** 2).mean()
def gain(outputs, targets): return -mse(outputs, targets)
def each(outputs, targets): return (outputs - targets) ** 2
def in_numpy(outputs, targets): return torch.tensor((outputs.numpy().argmax(1) == targets.numpy()).mean())
def broken(outputs, targets): raise ValueError("no\\nw")
def score(trained, initial): return trained
number = 3
"""


@pytest.fixture(autouse=True)
def _same_path_afterwards(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def user(tmp_path):
    (tmp_path / "user.py").write_text(USER)
    return f"{tmp_path}/user.py"


def recipe(user, **settings):
    base = {"model": {"spec": f"{user}:Net"}, "data": {"spec": f"{user}:images"}, "train": {"batch_size": 10}}
    base["run"] = {"device": "cpu", "tolerance": 1}
    for key, value in settings.items():
        section, _, name = key.partition("_")
        value = value.replace("user:", f"{user}:") if isinstance(value, str) else value
        base.setdefault(section, {})[name] = value
    return from_layers(base)


def test_the_task_and_the_resolved_recipe(user):
    resolved, task = assemble.assemble(recipe(user, train_iterations="2ep"))
    assert [len(split) for split in (task.data.train, task.data.validation, task.data.test)] == [36, 4, 9]
    assert (int(resolved.train.iterations), resolved.data.validation) == (7, 4)
    assert (resolved.run.device, resolved.run.engine) == ("cpu", "eager")
    assert task.device == torch.device("cpu")
    assert task.loss(torch.tensor([[9.0, 0.0]]), torch.tensor([0])) < 0.001
    assert task.metric(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1])) == 0.5


def test_a_resolved_recipe_assembles_to_itself(user):
    resolved, _ = assemble.assemble(recipe(user))
    again, _ = assemble.assemble(from_layers(resolved.plain()))
    assert again == resolved


def test_fresh_starts_follow_from_the_seed_and_not_from_what_is_trained(user):
    _, task = assemble.assemble(recipe(user))
    first = task.start(5)
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.zero_()
    assert all(torch.equal(value, first[name]) for name, value in task.start(5).items())
    assert not torch.equal(task.start(6)["fc.weight"], first["fc.weight"])
    assert {"norm.running_mean", "norm.num_batches_tracked"} <= first.keys()


def test_a_checkpoint_is_where_every_replicate_starts(user, tmp_path):
    saved = {f"module.{name}": value for name, value in models.source(f"{user}:Net", {}).new(77).state_dict().items()}
    torch.save({"state_dict": saved}, tmp_path / "w.pt")
    resolved, task = assemble.assemble(recipe(user, model_checkpoint=str(tmp_path / "w.pt")))
    for seed in (0, 1):
        start = task.start(seed)
        assert all(torch.equal(start[name.removeprefix("module.")], value) for name, value in saved.items())
    assert int(resolved.prune.rewind) == 0


def test_an_allowed_mismatch_starts_fresh_in_each_replicate(user, tmp_path):
    torch.save(models.source(f"{user}:Net", {"outputs": 9}).new(77).state_dict(), tmp_path / "w.pt")
    asked = {"model_checkpoint": str(tmp_path / "w.pt")}
    with pytest.raises(TicketfindError, match=r"other shape: fc\.weight \(3, 64\) in the model, \(9, 64\) in the file"):
        assemble.assemble(recipe(user, **asked))
    _, task = assemble.assemble(recipe(user, **asked, model_allow_mismatch=["fc.*"]))
    assert not torch.equal(task.start(0)["fc.weight"], task.start(1)["fc.weight"])
    assert task.given.keys() == {name for name in task.model.state_dict() if name.startswith("norm.")}


def test_looking_whether_model_and_data_fit_changes_neither_statistics_nor_generator(user):
    before = torch.get_rng_state()
    _, task = assemble.assemble(recipe(user))
    assert torch.equal(torch.get_rng_state(), before)
    assert task.model.norm.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_spec": None}, "data.spec: expected the data to train on; give --data"),
        ({"data_spec": "digits"}, "each of digits's labels 0 to 9, found outputs of shape [2, 3]"),
        ({"model_args": {"outputs": 2}}, "labels 0 to 2, found outputs of shape [2, 2]"),
        ({"model_spec": "user:Draws"}, "found outputs of shape [2, 1, 3] for targets of shape [2]"),
        ({"model_spec": "conv-2", "data_spec": "digits", "model_args": {"input_shape": [3, 8, 8]}},
         "model 'conv-2': cannot take digits's inputs ([2, 1, 8, 8] float32)"),
        ({"data_spec": "user:values"}, "expected class labels (whole numbers) for cross-entropy and accuracy, found"
         " [2, 1] float32 as targets; give --loss and --metric"),
        ({"data_spec": "user:values", "model_args": {"outputs": 1}, "train_loss": "user:mse"},
         "expected class labels (whole numbers) for accuracy, found [2, 1] float32 as targets; give --loss"),
        ({"train_loss": "user:broken"}, "user.py:broken: failed on outputs ([2, 3] float32) and targets ([2] int64)"),
        ({"data_spec": "user:values", "train_loss": "user:each", "train_metric": "user:gain"},
         "each: expected a scalar tensor, found shape (2, 3)"),
        ({"data_spec": "user:values", "train_loss": "user:mse", "train_metric": "user:broken"},
         "broken: failed on outputs ([2, 3] float32)"),
        ({"run_precision": "bf16", "train_metric": "user:in_numpy"},
         "in_numpy: failed on outputs ([2, 3] bfloat16) and targets ([2] int64): TypeError: Got unsupported"),
        ({"train_loss": "user:number"}, "user.py:number': expected a function, found int"),
        ({"train_loss": "user:gone"}, "has no 'gone'"),
        ({"train_batch_size": 37}, "train.batch_size: expected at most the 36 training examples, found 37"),
        ({"model_checkpoint": "gone.pt"}, "checkpoint gone.pt: no such file"),
        ({"run_device": "abacus"}, "run.device: expected a device that works here, found 'abacus'"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_named(user, settings, message):
    with pytest.raises(TicketfindError) as error:
        assemble.assemble(recipe(user, **settings))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_regression_with_a_loss_and_a_metric_of_its_own(user):
    _, task = assemble.assemble(
        recipe(
            user, data_spec="user:values", model_args={"outputs": 1}, train_loss="user:mse", train_metric="user:gain"
        )
    )
    outputs, targets = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [1.0]])
    assert (task.loss(outputs, targets), task.metric(outputs, targets)) == (2, -2)


def test_a_recipe_error_is_told_apart(user):
    with pytest.raises(RecipeError):
        assemble.assemble(recipe(user, train_batch_size=37))


def test_score_ofs(user):
    assert assemble.score_of(recipe(user)) is scores.SCORES["magnitude"]
    own = assemble.score_of(recipe(user, prune_score="user:score"))
    assert own.function(scores.Seen({"w": 1}, {}, {})) == {"w": 1}
    with pytest.raises(TicketfindError, match="expected a function, found int"):
        assemble.score_of(recipe(user, prune_score="user:number"))


def test_a_ticket_is_trained_again_without_its_checkpoint(user):
    asked = from_layers(
        {"model": {"spec": "resnet10t", "args": {"pretrained": True, "drop_rate": 0.1}, "checkpoint": "gone.pt",
                   "allow_mismatch": ["fc.*"]}}
    )  # fmt: skip
    found = assemble.for_ticket(asked)
    assert (found.model.checkpoint, found.model.allow_mismatch, found.model.args) == (None, (), {"drop_rate": 0.1})
    assert (found.model.spec, found.train, found.prune) == ("resnet10t", asked.train, asked.prune)
    own = recipe(user, model_args={"pretrained": True})
    assert assemble.for_ticket(own).model.args == {"pretrained": True}  # the user's factory may mean something else


@pytest.mark.parametrize(
    "prune",
    [
        {"every": 30},
        {"mask_stop": 0.8, "mask_lr": 0.1},
        {"mask_iterations": 30, "mask_lr": 0.1},
        {"ahead": [4, 4], "finetune": 30},
    ],
)
def test_a_ticket_is_trained_again_for_less_long_than_its_mask_took(prune: dict[str, Any]):
    found = from_layers(
        {"model": {"spec": "lenet-300-100"}, "data": {"spec": "digits"}, "prune": {"rewind": 0, **prune}}
    )
    own = found.resolved(train_size=900, validation=None, device="cpu")
    shorter = {"train.iterations": 20, "train.trainer": "a:b"}
    with pytest.raises(TicketfindError, match=r"prune\."):
        from_layers(own.plain(), nested(shorter)).resolved(train_size=900, validation=None, device="cpu")
    asked = from_layers(assemble.for_ticket(own).plain(), nested({**shorter, "run.tolerance": 1}))
    assert asked.resolved(train_size=900, validation=None, device="cpu").train.iterations == Duration(20)


def test_a_model_alone_is_as_its_factory_makes_it():
    alone = assemble.model_alone(from_layers({"model": {"spec": "lenet-300-100"}}))
    assert alone.fc1.in_features == 784


# ----------------------------------------------------------------------------- several kinds of models and data


HARD = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

class Regressor(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 1)
    def forward(self, x, labels):
        logits = self.fc(x)[:, 0]
        return {"loss": F.mse_loss(logits, labels), "logits": logits}

class Wide(nn.Module):
    def __init__(self, num_classes=77):
        super().__init__()
        self.fc = nn.Linear(3, num_classes)
    def forward(self, x): return self.fc(x)

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
    def forward(self, x): return {"a": self.fc(x), "b": self.fc(-x)}

class Plain(Dataset):
    def __len__(self): return 40
    def __getitem__(self, index): return torch.ones(3) * index, index % 4

def values():
    part = {"x": torch.randn(40, 3), "labels": torch.randn(40)}
    return part, part
def classes(): return Plain(), Plain()
def arrays(scale=1.0):
    part = torch.randn(40, 3) * scale, torch.arange(40) % 4
    return part, part
def two_loss(outputs, targets): return F.cross_entropy(outputs["a"], targets % 2)
inst = Wide(4)
"""


@pytest.fixture
def hard(tmp_path):
    (tmp_path / "hard.py").write_text(HARD)

    def make(model, data, **settings):
        layer = {"model": {"spec": f"{tmp_path}/hard.py:{model}"}, "data": {"spec": f"{tmp_path}/hard.py:{data}"},
                 "train": {"iterations": 4, "batch_size": 8}, "run": {"tolerance": 1}}  # fmt: skip
        for path, value in settings.items():
            section, key = path.split("_", 1)
            layer[section][key] = value if not isinstance(value, str) or ":" not in value else f"{tmp_path}/{value}"
        return from_layers(layer)

    return make


def test_a_model_with_a_loss_of_its_own_still_needs_a_metric_for_numbers(hard):
    with pytest.raises(TicketfindError, match=r"whole numbers\) for accuracy, found \[2\] float32"):
        assemble.assemble(hard("Regressor", "values"))


def test_classes_that_are_not_known_are_asked_for(hard):
    """A head of the factory's own size would look as if it fitted."""
    with pytest.raises(TicketfindError, match=r"how many classes it has is not known .* num_classes=N"):
        assemble.assemble(hard("Wide", "classes", data_resident=False))
    _, task = assemble.assemble(hard("Wide", "classes", data_resident=False, model_args={"num_classes": 4}))
    assert task.model.fc.out_features == 4
    _, task = assemble.assemble(hard("Wide", "classes"))
    assert task.model.fc.out_features == 4


def test_arguments_for_what_takes_none_are_refused(hard):
    with pytest.raises(TicketfindError, match=r"model\.args: expected none, as .*hard\.py:inst is a module already"):
        assemble.assemble(hard("inst", "arrays", model_args={"num_classes": 9}))


def test_a_network_whose_output_only_its_own_loss_knows_is_never_taken_for_disconnected(hard):
    _, task = assemble.assemble(hard("Two", "arrays", train_loss="hard.py:two_loss", train_metric="hard.py:two_loss"))
    start = task.start(0)
    assert not is_disconnected(task, start, {"fc.weight": torch.zeros(2, 3, dtype=torch.bool)})


def test_the_trained_file_has_a_key_of_its_own(hard, tmp_path):
    _, task = assemble.assemble(hard("Wide", "arrays"))
    torch.save(task.start(1), tmp_path / "start.pt")
    torch.save({"ema": task.start(2), "model": task.start(3)}, tmp_path / "end.pt")
    files = {"model_checkpoint": str(tmp_path / "start.pt"), "model_trained": str(tmp_path / "end.pt")}
    for key, seed in ((None, 3), ("ema", 2)):
        _, task = assemble.assemble(hard("Wide", "arrays", **files, model_trained_key=key))
        assert torch.equal(task.trained["fc.weight"], task.fresh(seed)["fc.weight"])
