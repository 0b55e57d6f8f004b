"""Steps of arms stacked into one, clipped gradients, pruned weights: against lanes of their own and plain PyTorch."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ticketfind import lanes
from ticketfind.lanes import Lane, Member, Stack, learning_rate
from ticketfind.masks import Masks
from ticketfind.nets import NETS
from ticketfind.outputs import cross_entropy
from ticketfind.recipe import Train
from ticketfind.train import Task

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "lr": 0.1},
    "sgd-momentum-decay": {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2},
    "adam-decay": {"optimizer": "adam", "lr": 1e-3, "weight_decay": 1e-2},
    "adamw": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1},
}
Start = tuple[dict[str, Tensor], Masks]


class Dicts(nn.Module):
    """Two inputs by name, a frozen layer, and one that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 4)
        self.unused, self.frozen = nn.Linear(3, 3), nn.Linear(8, 8)
        self.frozen.requires_grad_(False)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.out(self.frozen(F.relu(self.fc1(left) + self.fc2(right))))


def starts_of(model: nn.Module, arms: int) -> list[Start]:
    """Different weights and masks for each arm; the first is dense."""
    generator = torch.Generator().manual_seed(3)
    found: list[Start] = []
    for arm in range(arms):
        start = {
            name: value + 0.1 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
            for name, value in model.state_dict().items()
        }
        for name, value in start.items():
            if name.endswith("running_var"):
                start[name] = value.abs() + 0.5
        pruned = [n for n, p in model.named_parameters() if p.ndim > 1 and p.requires_grad] if arm else []
        kept = {name: torch.rand(start[name].shape, generator=generator) < 0.2 + 0.2 * arm for name in pruned}
        found.append((start, kept))
    return found


def batches_of(count: int, arms: int, shape: Sequence[int] = (12,), size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Batches of all arms, the first arm's examples first."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(arms * size, *shape, generator=generator), torch.randint(4, (arms * size,), generator=generator))
        for _ in range(count)
    ]


def steps(member: Member, batches: Sequence[Any], how: Train, look: Callable[[], None] = lambda: None) -> Tensor:
    """The losses, [iterations, arms]."""
    member.ready(to_train=True)
    losses = []
    for iteration, batch in enumerate(batches):
        losses.append(member.step(batch, learning_rate(how, iteration)))
        look()
    return torch.stack(losses)


def part(batch: tuple[Any, Tensor], arm: int, size: int) -> tuple[Any, Tensor]:
    """One arm's share of a batch."""
    here = slice(arm * size, (arm + 1) * size)
    inputs = {k: v[here] for k, v in batch[0].items()} if isinstance(batch[0], dict) else batch[0][here]
    return inputs, batch[1][here]


def assert_a_stack_is_its_lanes(
    model: nn.Module, batches: Sequence[Any], how: Train, starts: Sequence[Start], size: int = 16
) -> None:
    stack = Stack(copy.deepcopy(model), starts, how, cross_entropy)
    together = steps(stack, batches, how)
    states = stack.states()
    for arm, (start, masks) in enumerate(starts):
        lane = Lane(copy.deepcopy(model), start, masks, how, cross_entropy)
        alone = steps(lane, [part(batch, arm, size) for batch in batches], how)
        torch.testing.assert_close(together[:, arm : arm + 1], alone, rtol=0, atol=1e-5)
        (expected,) = lane.states()
        assert states[arm].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(states[arm][name], value, rtol=0, atol=1e-5, msg=f"{name} of arm {arm}")
        moved = max(float((states[arm][name] - start[name]).abs().max()) for name, _ in model.named_parameters())
        assert moved > 1e-3  # the comparison was of something


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", ["mlp", "normed", "tied"])
def test_a_stack_is_its_lanes(
    net: str, optimizer: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """20 steps to 1e-5, BatchNorm's statistics included; masks differ, one arm has none."""
    model = make_task(net).model
    how = make_train(iterations=20, schedule="cosine", warmup=3, **OPTIMIZERS[optimizer])
    assert_a_stack_is_its_lanes(model, batches_of(20, 3), how, starts_of(model, 3))


def shallow() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)
    )


@pytest.mark.parametrize("net", ["shallow", "resnet-20"])
def test_a_stack_of_convolutions_is_its_lanes(net: str, make_train: Callable[..., Train]) -> None:
    """A deep one in float64: with BatchNorm and few images it soon makes much of float32's rounding."""
    torch.manual_seed(0)
    model = shallow() if net == "shallow" else NETS[net](input_shape=(1, 8, 8), num_classes=4).double()
    dtype = next(model.parameters()).dtype
    how = make_train(iterations=20, momentum=0.9, lr=1e-2, weight_decay=1e-4)
    starts = [(dict(model.state_dict()), masks) for _, masks in starts_of(model, 2)]
    batches = [(inputs.to(dtype), targets) for inputs, targets in batches_of(20, 2, (1, 8, 8), 8)]
    assert_a_stack_is_its_lanes(model, batches, how, starts, size=8)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_stack_takes_dicts_and_leaves_frozen_and_unused_parameters_alone(
    optimizer: str, make_train: Callable[..., Train]
) -> None:
    torch.manual_seed(0)
    model = Dicts()
    starts = starts_of(model, 2)
    batches = [({"left": x[:, :6], "right": x[:, 6:]}, y) for x, y in batches_of(20, 2)]
    how = make_train(iterations=20, **{**OPTIMIZERS[optimizer], "lr": 0.02})
    assert_a_stack_is_its_lanes(model, batches, how, starts)
    stack = Stack(copy.deepcopy(model), starts, how, cross_entropy)
    steps(stack, batches, how)
    for state, (start, masks) in zip(stack.states(), starts, strict=True):
        for name in ("unused.weight", "frozen.weight"):
            assert torch.equal(state[name], start[name] * masks.get(name, torch.ones(()))), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["lane", "stack"])
def test_pruned_weights_are_exactly_zero_after_every_step(
    kind: str, optimizer: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    model, how = make_task("normed").model, make_train(iterations=50, clip=0.5, **OPTIMIZERS[optimizer])
    starts = starts_of(model, 2)[1:]
    if kind == "lane":
        member: Member = Lane(copy.deepcopy(model), *starts[0], how, cross_entropy)
    else:
        member = Stack(copy.deepcopy(model), starts * 2, how, cross_entropy)
    seen: list[bool] = []

    def look() -> None:
        for state in member.states():
            seen.append(all(torch.equal(state[name] == 0, ~mask) for name, mask in starts[0][1].items()))

    steps(member, batches_of(50, member.arms), how, look)
    assert seen == [True] * 50 * member.arms  # survivors are not zero, pruned weights are


@pytest.mark.parametrize("optimizer", ["adam-decay", "adamw"])
def test_an_infinite_second_moment_does_what_masks_do_to_the_bit(
    optimizer: str, make_task: Callable[..., Task], make_train: Callable[..., Train], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, how = make_task("normed").model, make_train(iterations=30, **OPTIMIZERS[optimizer])
    (start,) = starts_of(model, 2)[1:]
    assert lanes._divides_by_infinity(torch.device("cpu"), torch.float32)
    held = Lane(copy.deepcopy(model), *start, how, cross_entropy)
    losses = steps(held, batches_of(30, 1), how)
    monkeypatch.setattr(lanes, "_divides_by_infinity", lambda device, dtype: False)
    masked = Lane(copy.deepcopy(model), *start, how, cross_entropy)
    assert torch.equal(losses, steps(masked, batches_of(30, 1), how))
    for name, value in masked.states()[0].items():
        assert torch.equal(value, held.states()[0][name]), name


@pytest.mark.parametrize("kind", ["lane", "stack"])
def test_gradients_are_clipped_as_pytorch_does_each_arm_by_itself(
    kind: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """The second arm's gradients are long, the first's are not; pruned weights do not count."""
    model, limit = make_task("mlp").model, 0.3
    how = make_train(iterations=10, lr=0.1, clip=limit)
    starts = starts_of(model, 2)
    batches = [(x * torch.cat([torch.full((16, 1), 0.05), torch.full((16, 1), 5.0)]), y) for x, y in batches_of(10, 2)]
    clipped = []
    expected = []
    for arm, (start, masks) in enumerate(starts):
        plain = copy.deepcopy(model)
        plain.load_state_dict({name: value * masks.get(name, torch.ones(())) for name, value in start.items()})
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        for batch in batches:
            inputs, targets = part(batch, arm, 16)
            optimizer.zero_grad()
            F.cross_entropy(plain(inputs), targets).backward()
            for name, mask in masks.items():
                plain.get_parameter(name).grad *= mask
            clipped.append(float(nn.utils.clip_grad_norm_(plain.parameters(), limit)) > limit)
            optimizer.step()
        expected.append({name: value.clone() for name, value in plain.state_dict().items()})
    assert True in clipped[10:] and False in clipped[:10]
    if kind == "stack":
        stack = Stack(copy.deepcopy(model), starts, how, cross_entropy)
        steps(stack, batches, how)
        found = stack.states()
    else:
        found = []
        for arm, (start, masks) in enumerate(starts):
            lane = Lane(copy.deepcopy(model), start, masks, how, cross_entropy)
            steps(lane, [part(batch, arm, 16) for batch in batches], how)
            found += lane.states()
    for state, wanted in zip(found, expected, strict=True):
        for name, value in wanted.items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-5, msg=name)


def test_dropout_is_drawn_for_each_arm(make_train: Callable[..., Train]) -> None:
    model = nn.Sequential(nn.Linear(12, 64), nn.Dropout(0.5), nn.Linear(64, 4))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    stack = Stack(model, [(start, {}), (start, {})], make_train(), cross_entropy)
    (inputs, targets), *_ = batches_of(1, 1)
    torch.manual_seed(0)
    (losses,) = steps(stack, [(torch.cat([inputs, inputs]), torch.cat([targets, targets]))], make_train())
    assert losses[0] != losses[1]


def test_channels_last_changes_the_memory_and_not_the_numbers(make_train: Callable[..., Train]) -> None:
    torch.manual_seed(0)
    model = NETS["resnet-20"](input_shape=(3, 8, 8), num_classes=4)
    _, (_, masks) = starts_of(model, 2)
    start, how = {k: v.clone() for k, v in model.state_dict().items()}, make_train(iterations=10, lr=1e-3, momentum=0.9)
    found = {}
    for last in (False, True):
        lane = Lane(copy.deepcopy(model), start, masks, how, cross_entropy, channels_last=last)
        weight = lane.everything()[0]
        assert weight.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        losses = steps(lane, batches_of(10, 1, (3, 8, 8), 8), how)
        (found[last],) = lane.states()
        found[last]["losses"] = losses
    assert all(value.is_contiguous() for value in found[True].values())
    for name, value in found[False].items():
        torch.testing.assert_close(found[True][name], value, rtol=0, atol=1e-5, msg=name)


def test_networks_of_a_stack_are_its_arms(make_task: Callable[..., Task], make_train: Callable[..., Train]) -> None:
    model = make_task("normed").model
    starts = starts_of(model, 3)
    stack = Stack(copy.deepcopy(model), starts, make_train(), cross_entropy)
    stack.ready(to_train=False)
    (inputs, _), *_ = batches_of(1, 1)
    for network, (start, masks) in zip(stack.networks(), starts, strict=True):
        lanes.put(model, start, masks)
        with torch.no_grad():
            torch.testing.assert_close(network(inputs), model.eval()(inputs))
