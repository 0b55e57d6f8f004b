"""Steps of one arm against plain PyTorch, and of arms stacked into one against lanes of their own."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from one_arm import OPTIMIZERS, SCHEDULES, OneArm, random_batches, random_masks, state_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from ticketfind import updates
from ticketfind.arms import Task
from ticketfind.lanes import Lane, Member, Stack, learning_rate
from ticketfind.masks import Masks
from ticketfind.nets import NETS
from ticketfind.outputs import cross_entropy
from ticketfind.recipe import Train

ADAPTIVE = [name for name, settings in OPTIMIZERS.items() if settings["optimizer"] != "sgd"]


def torch_optimizer(model: nn.Module, how: Train) -> torch.optim.Optimizer:
    """What a user of PyTorch would write for `how`."""
    common = {"lr": how.lr, "weight_decay": how.weight_decay}
    if how.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=how.momentum, foreach=False, **common)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[how.optimizer](
        model.parameters(), foreach=False, **common
    )


def torch_scheduler(optimizer: torch.optim.Optimizer, how: Train) -> lr_scheduler.LRScheduler:
    """PyTorch's own schedules, put together as `how` describes them."""
    warmup, total = int(how.warmup), int(how.iterations)
    rise = lr_scheduler.LinearLR(optimizer, 1 / max(warmup, 1), 1.0, total_iters=max(warmup - 1, 1))
    if how.schedule == "constant":
        return rise
    if how.schedule == "step":
        drops = lr_scheduler.MultiStepLR(optimizer, [int(m) for m in how.milestones], gamma=0.1)
        return lr_scheduler.ChainedScheduler([rise, drops])
    fall = lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warmup)
    return lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[warmup]) if warmup else fall


# ------------------------------------------------------------------------------------------------- one arm


def assert_trains_as_plain_pytorch(model: nn.Module, how: Train, moved: str) -> None:
    """30 steps under random masks, here and in the loop that a user would write; `moved` must have moved."""
    masks, batches, start = random_masks(model), random_batches(30), state_of(model)
    plain = copy.deepcopy(model)
    masked = [(plain.get_parameter(name), mask) for name, mask in masks.items()]
    for parameter, mask in masked:
        parameter.data *= mask
    torchs = torch_optimizer(plain, how)
    scheduler = torch_scheduler(torchs, how)
    losses = []
    plain.train()
    for inputs, targets in batches:
        torchs.zero_grad()
        loss = F.cross_entropy(plain(inputs), targets)
        loss.backward()
        for parameter, mask in masked:
            parameter.grad *= mask
        torchs.step()
        scheduler.step()
        for parameter, mask in masked:
            parameter.data *= mask
        losses.append(loss.item())

    lane = OneArm(model, start, masks, how, cross_entropy, seed=0)
    assert lane.advance(batches, 0) == pytest.approx(losses, abs=1e-6)
    for name, expected in plain.state_dict().items():
        torch.testing.assert_close(lane.state()[name], expected, rtol=0, atol=1e-6, msg=name)
    assert (lane.state()[moved] - start[moved])[masks[moved]].abs().max() > 3e-3  # the comparison was of something


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", ["mlp", "normed"])
def test_masked_training_is_what_plain_pytorch_does(
    net: str, optimizer: str, schedule: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    how = make_train(iterations=30, **OPTIMIZERS[optimizer], **SCHEDULES[schedule])
    assert_trains_as_plain_pytorch(make_task(net).model, how, "fc1.weight")


class Transposed(nn.Module):
    """[b, 12] -> [b, 4]; autograd gives the weight a gradient with its memory the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 12, generator=torch.Generator().manual_seed(0)) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.w.t() * 1.0).contiguous()


class Summed(Transposed):
    """[b, 12] -> [b, 4]; autograd gives both parameters one and the same tensor as their gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros(4, 12))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w + self.v)


class Images(nn.Module):
    """[b, 12] -> [b, 4]; a convolution with its weight in channels-last memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.w = nn.Conv2d(3, 4, 2), nn.Parameter(torch.eye(4))
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.conv(x.view(-1, 3, 2, 2)).flatten(1), self.w)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", [Transposed, Summed, Images])
def test_gradients_of_any_memory_are_taken_as_plain_pytorch_takes_them(
    net: type[nn.Module], optimizer: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    assert_trains_as_plain_pytorch(make_task(net).model, make_train(iterations=30, **OPTIMIZERS[optimizer]), "w")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rates_are_those_of_pytorchs_schedulers(schedule: str, make_train: Callable[..., Train]) -> None:
    how = make_train(iterations=30, lr=0.4, **SCHEDULES[schedule])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=how.lr)
    scheduler = torch_scheduler(optimizer, how)
    expected = []
    for _ in range(30):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert [learning_rate(how, i) for i in range(30)] == pytest.approx(expected, rel=1e-9)


def test_learning_rates_by_hand(make_train: Callable[..., Train]) -> None:
    """Warmup ends at the full rate; cosine is half way down in the middle; milestones count from iteration 0."""
    cosine = make_train(iterations=24, lr=0.8, schedule="cosine", warmup=4)
    assert [learning_rate(cosine, i) for i in (0, 1, 3, 4, 14)] == pytest.approx([0.2, 0.4, 0.8, 0.8, 0.4])
    assert 0 < learning_rate(cosine, 23) < 0.01
    step = make_train(iterations=24, lr=0.8, schedule="step", milestones=[10, 20])
    assert [learning_rate(step, i) for i in (9, 10, 19, 20)] == pytest.approx([0.8, 0.08, 0.08, 0.008])


@pytest.mark.parametrize("net", ["mlp", "normed"])
def test_a_lane_starts_from_exactly_what_it_is_given(
    net: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """Nothing of the model's previous training is left: weights, statistics, optimizer state."""
    task, how, batches = make_task(net), make_train(momentum=0.9), random_batches(6)
    start, masks = task.start(3), random_masks(task.model)
    OneArm(task.model, task.start(4), {}, how, cross_entropy, seed=0).advance(batches, 0)
    lane = OneArm(task.model, start, masks, how, cross_entropy, seed=0)
    for name, value in lane.state().items():
        expected = start[name] * masks[name] if name in masks else start[name]
        assert torch.equal(value, expected), name
    losses = lane.advance(batches, 0)
    assert losses == OneArm(make_task(net).model, start, masks, how, cross_entropy, seed=0).advance(batches, 0)


def test_tied_weights_are_masked_under_all_their_names(
    make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    task = make_task("tied")
    mask = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)) < 0.3
    start = task.start(1)
    lane = OneArm(task.model, start, {"encode.weight": mask}, make_train(), cross_entropy, seed=0)
    for name in ("encode.weight", "decode.weight"):
        assert torch.equal(lane.state()[name], start[name] * mask), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_and_sometimes_unused_parameters_are_left_alone_as_in_pytorch(
    optimizer: str, make_train: Callable[..., Train]
) -> None:
    """Stochastic depth: a layer takes no part in the first steps, and joins later."""

    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late, self.frozen = nn.Linear(12, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.frozen.requires_grad_(False)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            x = self.early(x)
            return self.frozen(self.late(x) if self.calls > 2 else x)

    how, batches = make_train(**OPTIMIZERS[optimizer]), random_batches(5)
    model = Skipping()
    plain = copy.deepcopy(model)
    start = state_of(model)
    torchs = torch_optimizer(plain, how)
    for inputs, targets in batches:
        torchs.zero_grad()
        F.cross_entropy(plain(inputs), targets).backward()
        torchs.step()
    lane = OneArm(model, start, {}, how, cross_entropy, seed=0)
    lane.advance(batches, 0)
    for name, expected in plain.state_dict().items():
        torch.testing.assert_close(lane.state()[name], expected, rtol=0, atol=1e-6, msg=name)
    assert torch.equal(lane.state()["frozen.weight"], start["frozen.weight"])
    assert not torch.equal(lane.state()["late.weight"], start["late.weight"])


# ---------------------------------------------------------------------------------------- arms stacked as one

Start = tuple[dict[str, Tensor], Masks]


class Named(nn.Module):
    """Two inputs by name, a frozen layer, and one that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 4)
        self.unused, self.frozen = nn.Linear(3, 3), nn.Linear(8, 8)
        self.frozen.requires_grad_(False)

    def forward(self, b: Tensor, a: Tensor) -> Tensor:
        return self.out(self.frozen(F.relu(self.left(a) + self.right(b))))


def starts_of(model: nn.Module, arms: int) -> list[Start]:
    """Weights of each arm's own, and masks: none, then of 40 %, 60 %, ... of the weights."""
    generator = torch.Generator().manual_seed(3)

    def near(name: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value.clone()
        noise = 0.1 * torch.randn(value.shape, generator=generator).to(value)
        return (value + noise).abs() + 0.5 if name.endswith("running_var") else value + noise

    return [
        (
            {name: near(name, value) for name, value in model.state_dict().items()},
            random_masks(model, 0.2 + 0.2 * arm, seed=arm) if arm else {},
        )
        for arm in range(arms)
    ]


def steps(member: Member, batches: Sequence[Any], how: Train, look: Callable[[], None] = lambda: None) -> Tensor:
    """The losses, [iterations, arms]."""
    member.ready(to_train=True)
    losses = []
    for iteration, batch in enumerate(batches):
        losses.append(member.step(batch, learning_rate(how, iteration)))
        look()
    return torch.stack(losses)


def part(batch: tuple[Any, Tensor], arm: int, arms: int) -> tuple[Any, Tensor]:
    """One arm's share of a batch."""
    size = len(batch[1]) // arms
    here = slice(arm * size, (arm + 1) * size)
    inputs = {k: v[here] for k, v in batch[0].items()} if isinstance(batch[0], dict) else batch[0][here]
    return inputs, batch[1][here]


def assert_a_stack_is_its_lanes(
    model: nn.Module, batches: Sequence[Any], how: Train, starts: Sequence[Start], atol: float = 1e-5
) -> None:
    """Losses, weights and statistics of every arm, which have moved."""
    stack = Stack(copy.deepcopy(model), starts, how, cross_entropy)
    together = steps(stack, batches, how)
    for arm, ((start, masks), state) in enumerate(zip(starts, stack.states(), strict=True)):
        lane = Lane(copy.deepcopy(model), start, masks, how, cross_entropy)
        alone = steps(lane, [part(batch, arm, len(starts)) for batch in batches], how)
        torch.testing.assert_close(together[:, arm : arm + 1], alone, rtol=0, atol=atol)
        (expected,) = lane.states()
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=atol, msg=f"{name} of arm {arm}")
            kept = masks.get(name, torch.ones((), dtype=torch.bool))
            assert torch.equal(state[name] * ~kept, torch.zeros_like(value)), f"{name} of arm {arm}"
        moved = [(state[name] - value)[masks[name]] for name, value in start.items() if name in masks]
        moved = moved or [state[name] - start[name] for name, p in model.named_parameters() if p.requires_grad]
        assert max(float(m.abs().max()) for m in moved) > 1e-3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", ["mlp", "normed", "tied"])
def test_a_stack_is_its_lanes(
    net: str, optimizer: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """20 steps to 1e-5, BatchNorm's statistics included; masks differ, one arm has none."""
    model = make_task(net).model
    settings = {**OPTIMIZERS[optimizer], "lr": min(0.1, OPTIMIZERS[optimizer]["lr"])}
    how = make_train(iterations=20, schedule="cosine", warmup=3, **settings)
    assert_a_stack_is_its_lanes(model, random_batches(20, 3 * 16), how, starts_of(model, 3))


@pytest.mark.parametrize(
    ("net", "dtype", "lr", "atol"),
    [
        ("conv-2", torch.float32, 1e-2, 1e-5),
        ("resnet-20", torch.float32, 1e-4, 1e-5),
        ("resnet-20", torch.float64, 1e-2, 1e-9),
    ],
)
def test_a_stack_of_convolutions_is_its_lanes(
    net: str, dtype: torch.dtype, lr: float, atol: float, make_train: Callable[..., Train]
) -> None:
    """resnet-20 at a usual rate in float64 only: 19 BatchNorms of 2x2 images soon make much of float32's rounding."""
    torch.manual_seed(0)
    model = NETS[net](input_shape=(1, 8, 8), num_classes=4).to(dtype)
    how = make_train(iterations=20, momentum=0.9, lr=lr, weight_decay=1e-4)
    batches = [(inputs.to(dtype), targets) for inputs, targets in random_batches(20, 2 * 16, (1, 8, 8))]
    (start, _), (_, masks) = starts_of(model, 2)
    assert_a_stack_is_its_lanes(model, batches, how, [(start, {}), (state_of(model), masks)], atol)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_stack_takes_named_inputs_and_leaves_frozen_and_unused_parameters_alone(
    optimizer: str, make_train: Callable[..., Train]
) -> None:
    torch.manual_seed(0)
    model = Named()
    starts = starts_of(model, 2)
    batches = [({"a": x[:, :6], "b": x[:, 6:]}, y) for x, y in random_batches(20, 2 * 16)]
    how = make_train(iterations=20, **{**OPTIMIZERS[optimizer], "lr": 0.02})
    assert_a_stack_is_its_lanes(model, batches, how, starts)
    stack = Stack(copy.deepcopy(model), starts, how, cross_entropy)
    steps(stack, batches, how)
    for state, (start, masks) in zip(stack.states(), starts, strict=True):
        for name in ("unused.weight", "unused.bias", "frozen.weight", "frozen.bias"):
            assert torch.equal(state[name], start[name] * masks.get(name, torch.ones(()))), name


@pytest.mark.parametrize("arms", [1, 3])
def test_a_stack_starts_from_exactly_what_it_is_given(
    arms: int, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """And goes back there: its optimizer forgets, but does not forget what is pruned."""
    model, how = make_task("normed").model, make_train(optimizer="adam", lr=0.01)
    starts = starts_of(model, 3)[-arms:]
    stack = Stack(copy.deepcopy(model), starts, how, cross_entropy)
    first = stack.states()
    for state, (start, masks) in zip(first, starts, strict=True):
        for name, value in state.items():
            assert torch.equal(value, start[name] * masks[name] if name in masks else start[name]), name
    before = [t.clone() for t in stack.everything()]
    losses = steps(stack, random_batches(6, 16 * arms), how)
    for tensor, value in zip(stack.everything(), before, strict=True):
        tensor.copy_(value)
    assert torch.equal(steps(stack, random_batches(6, 16 * arms), how), losses)
    assert not torch.equal(first[0]["fc1.weight"], stack.states()[0]["fc1.weight"])  # `first` is a copy


def test_networks_of_a_stack_are_its_arms(make_task: Callable[..., Task], make_train: Callable[..., Train]) -> None:
    """In evaluation mode: statistics are used and left alone."""
    model = make_task("normed").model
    starts = starts_of(model, 3)
    stack = Stack(copy.deepcopy(model), starts, make_train(), cross_entropy)
    stack.ready(to_train=False)
    ((inputs, _),) = random_batches(1)
    with torch.no_grad():
        found = [network(inputs) for network in stack.networks()]
    for outputs, state, (start, masks) in zip(found, stack.states(), starts, strict=True):
        model.load_state_dict({name: value * masks.get(name, torch.tensor(1)) for name, value in start.items()})
        with torch.no_grad():
            torch.testing.assert_close(outputs, model.eval()(inputs), rtol=0, atol=1e-6)
        assert torch.equal(state["norm.running_mean"], start["norm.running_mean"])


def test_dropout_is_drawn_for_each_arm(make_train: Callable[..., Train]) -> None:
    model = nn.Sequential(nn.Linear(12, 64), nn.Dropout(0.5), nn.Linear(64, 4))
    start, how = state_of(model), make_train()
    ((inputs, targets),) = random_batches(1)
    twice = (torch.cat([inputs, inputs]), torch.cat([targets, targets]))

    def losses(seed: int) -> list[float]:
        stack = Stack(copy.deepcopy(model), [(start, {}), (start, {})], how, cross_entropy)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return steps(stack, [twice], how)[0].tolist()

    one, other = losses(0)
    assert one != other
    assert losses(0) == [one, other] != losses(1)


# ----------------------------------------------------------------------------------------- one arm and several


def members_of(kind: str, model: nn.Module, starts: Sequence[Start], how: Train) -> list[Member]:
    """Lanes of their own, or one stack."""
    if kind == "stack":
        return [Stack(copy.deepcopy(model), starts, how, cross_entropy)]
    return [Lane(copy.deepcopy(model), start, masks, how, cross_entropy) for start, masks in starts]


def train(
    members: Sequence[Member], batches: Sequence[Any], how: Train, look: Callable[[], None] = lambda: None
) -> Tensor:
    """Batches of all arms; the losses, [iterations, arms]."""
    if len(members) == 1 and members[0].arms > 1:
        return steps(members[0], batches, how, look)
    shared = [[part(batch, arm, len(members)) for batch in batches] for arm in range(len(members))]
    return torch.cat([steps(member, own, how, look) for member, own in zip(members, shared, strict=True)], dim=1)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["lane", "stack"])
def test_pruned_weights_are_exactly_zero_after_every_step(
    kind: str, optimizer: str, clip: float | None, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """Each arm's own; survivors are not zero, pruned weights are."""
    model, how = make_task("normed").model, make_train(iterations=30, clip=clip, **OPTIMIZERS[optimizer])
    starts = starts_of(model, 3)
    members = members_of(kind, model, starts, how)
    seen: list[bool] = []

    def look() -> None:
        states = [state for member in members for state in member.states()]
        pairs = [
            (state[name], mask)
            for state, (_, masks) in zip(states, starts, strict=True)
            for name, mask in masks.items()
        ]
        seen.append(len(pairs) == 4 and all(torch.equal(value == 0, ~mask) for value, mask in pairs))

    train(members, random_batches(30, 3 * 16), how, look)
    assert seen == [True] * 30 * len(members)


@pytest.mark.parametrize("optimizer", ADAPTIVE)
@pytest.mark.parametrize("kind", ["lane", "stack"])
def test_an_infinite_second_moment_does_what_masks_do_to_the_bit(
    kind: str, optimizer: str, make_task: Callable[..., Task], make_train: Callable[..., Train],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model, how = make_task("normed").model, make_train(iterations=30, **OPTIMIZERS[optimizer])
    starts, batches = starts_of(model, 3), random_batches(30, 3 * 16)
    assert updates._divides_by_infinity(torch.device("cpu"), torch.float32)
    found = []
    for holds in (True, False):
        monkeypatch.setattr(updates, "_divides_by_infinity", lambda device, dtype, holds=holds: holds)
        members = members_of(kind, model, starts, how)
        losses = train(members, batches, how)
        found.append((losses, [state for member in members for state in member.states()]))
    (losses, held), (other_losses, masked) = found
    assert torch.equal(losses, other_losses)
    for state, other in zip(held, masked, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in state.items())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("kind", ["lane", "stack"])
def test_gradients_are_clipped_as_pytorch_clips_them_each_arm_by_itself(
    kind: str, optimizer: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """The second arm's gradients are long, the others' are not; pruned weights do not count."""
    model, limit, arms = make_task("mlp").model, 0.5, 3
    how = make_train(iterations=10, optimizer=optimizer, lr=0.01, clip=limit)
    starts = starts_of(model, arms)
    size = torch.tensor([0.05, 20.0, 0.05]).repeat_interleave(16)[:, None]
    batches = [(x * size, y) for x, y in random_batches(10, 16 * arms)]
    members = members_of(kind, model, starts, how)
    train(members, batches, how)
    found = [state for member in members for state in member.states()]
    for arm, (start, masks) in enumerate(starts):
        plain = copy.deepcopy(model)
        plain.load_state_dict({name: value * masks.get(name, torch.ones(())) for name, value in start.items()})
        torchs, lengths = torch_optimizer(plain, how), []
        for batch in batches:
            inputs, targets = part(batch, arm, arms)
            torchs.zero_grad()
            F.cross_entropy(plain(inputs), targets).backward()
            for name, mask in masks.items():
                plain.get_parameter(name).grad *= mask
            lengths.append(float(nn.utils.clip_grad_norm_(plain.parameters(), limit)))
            torchs.step()
        assert min(lengths) > limit if arm == 1 else max(lengths) < limit
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(found[arm][name], value, rtol=0, atol=1e-5, msg=f"{name} of arm {arm}")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_channels_last_changes_the_memory_and_not_the_numbers(optimizer: str, make_train: Callable[..., Train]) -> None:
    """The weights are held that way; what is given out is in the usual one. In float64, as Adam blows up rounding."""
    torch.manual_seed(0)
    model = NETS["conv-2"](input_shape=(3, 8, 8), num_classes=4).double()
    batches = [(inputs.double(), targets) for inputs, targets in random_batches(10, 16, (3, 8, 8))]
    (_, (start, masks)), found = starts_of(model, 2), {}
    how = make_train(iterations=10, **{**OPTIMIZERS[optimizer], "lr": 1e-2 if "sgd" in optimizer else 1e-3})
    for last in (False, True):
        lane = Lane(copy.deepcopy(model), start, masks, how, cross_entropy, channels_last=last)
        convolution = next(t for t in lane.everything() if t.ndim == 4)
        assert convolution.is_contiguous(memory_format=torch.channels_last) == last
        losses = steps(lane, batches, how)
        lane.ready(to_train=False)
        (state,), (network,) = lane.states(), lane.networks()
        with torch.no_grad():
            outputs = network(batches[0][0])
        found[last] = {**state, "losses": losses, "outputs": outputs}
    assert all(value.is_contiguous() for value in found[True].values())
    for name, value in found[False].items():
        torch.testing.assert_close(found[True][name], value, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("kind", ["lane", "stack"])
def test_an_optimizer_that_does_not_hold_pruned_weights_is_found_out(
    kind: str, make_task: Callable[..., Task], make_train: Callable[..., Train], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a device's Adam does something else with an infinite second moment, masks are used."""
    real = torch._fused_adam_

    def moves_everything(parameters: list[Tensor], *args: Any, **settings: Any) -> None:
        real(parameters, *args, **settings)
        for parameter in parameters:
            parameter += 1.0

    model, how = make_task("mlp").model, make_train(optimizer="adam", lr=0.01)
    starts = starts_of(model, 2)
    updates._divides_by_infinity.cache_clear()
    monkeypatch.setattr(torch, "_fused_adam_", moves_everything)
    try:
        members = members_of(kind, model, starts, how)
        train(members, random_batches(1, 32), how)
        state = [state for member in members for state in member.states()][1]
        assert all(torch.equal(state[name] == 0, ~mask) for name, mask in starts[1][1].items())
    finally:
        updates._divides_by_infinity.cache_clear()
