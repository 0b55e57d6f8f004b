import math

import pytest
import torch
from torch import nn

from ticketfind import forks
from ticketfind.arms import Arm
from ticketfind.devices import Way
from ticketfind.nets import NETS
from ticketfind.train import fit


@pytest.mark.parametrize(
    ("name", "weights", "conv_weights"),
    [  # arXiv 1803.03635v5, figure 2, prints:
        ("lenet-300-100", 266_200, 0),  # 266K
        ("conv-2", 4_300_992, 38_592),  # 4.3M, 38K
        ("conv-4", 2_425_024, 259_776),  # 2.4M, 260K
        ("conv-6", 2_261_184, 1_144_512),  # 1.7M, 1.1M: not what its layers add up to (facts.md)
        ("resnet-20", 270_896, 270_256),  # 274K, 270K: see below
        ("vgg-19", 20_024_000, 20_018_880),  # 20.0M
    ],
)
def test_sizes_are_the_papers(name, weights, conv_weights):
    model = NETS[name]()
    assert sum(p.numel() for p in model.parameters() if p.ndim > 1) == weights
    assert sum(p.numel() for p in model.parameters() if p.ndim == 4) == conv_weights


def test_resnet_has_the_274k_of_the_paper_with_its_normalization_and_20_layers():
    state = NETS["resnet-20"]().state_dict()
    assert sum(value.numel() for name, value in state.items() if "num_batches" not in name) == 274_042
    assert sum(value.ndim in (2, 4) and "shortcut" not in name for name, value in state.items()) == 20


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("input_shape", "num_classes"), [((1, 8, 8), 3), ((3, 32, 32), 10), ((2, 13, 17), 5)])
def test_any_input_size_and_number_of_classes(name, input_shape, num_classes):
    with torch.device("meta"):
        model = NETS[name](input_shape=input_shape, num_classes=num_classes)
        outputs = model(torch.zeros(2, *input_shape))
    assert outputs.shape == (2, num_classes)


@pytest.mark.parametrize("name", ["lenet-300-100", "conv-2", "resnet-20"])
def test_gaussian_glorot_throughout(name):
    torch.manual_seed(0)
    draws = []
    for module in NETS[name]().modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            weight = module.weight.detach()
            field = math.prod(weight.shape[2:])
            draws.append(weight.flatten() / math.sqrt(2 / (field * (weight.shape[0] + weight.shape[1]))))
            assert draws[-1].std() == pytest.approx(1, abs=4 / math.sqrt(2 * weight.numel()))
            assert module.bias is None or not module.bias.any()
    z = torch.cat(draws)
    assert z.mean() == pytest.approx(0, abs=4 / math.sqrt(z.numel()))
    assert (z.abs() > 2).float().mean() == pytest.approx(0.0455, abs=0.002)  # Gaussian, not uniform nor truncated


def test_lenet_by_hand():
    model = NETS["lenet-300-100"](input_shape=(1, 2, 2), num_classes=3)
    x = torch.randn(5, 1, 2, 2)
    w = dict(model.named_parameters())
    hidden = (x.view(5, 4) @ w["fc1.weight"].T + w["fc1.bias"]).clamp(min=0)
    hidden = (hidden @ w["fc2.weight"].T + w["fc2.bias"]).clamp(min=0)
    torch.testing.assert_close(model(x), hidden @ w["fc3.weight"].T + w["fc3.bias"])


def test_resnet_halves_the_image_twice_and_pads_no_channels():
    model = NETS["resnet-20"]()
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[1:])))
    model(torch.zeros(1, 3, 32, 32))
    assert seen == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3
    convolutions = [name for name, m in model.named_modules() if "shortcut" in name and isinstance(m, nn.Conv2d)]
    assert convolutions == ["blocks.3.shortcut.0", "blocks.6.shortcut.0"]


def test_vgg_has_16_convolutions_and_no_image_left():
    model = NETS["vgg-19"]()
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 16
    with torch.no_grad():
        assert model.eval().features(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 2, 2)


@pytest.mark.parametrize("name", ["lenet-300-100", "conv-2"])
def test_dropout_is_after_the_hidden_fully_connected_layers_and_in_no_state(name):
    torch.manual_seed(0)
    plain, dropped = NETS[name](input_shape=(1, 8, 8)), NETS[name](input_shape=(1, 8, 8), dropout=0.5)
    dropped.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(64, 1, 8, 8)
    torch.testing.assert_close(dropped.eval()(x), plain(x), rtol=0, atol=0)
    seen = {}
    for layer in ("fc1", "fc2", "fc3"):
        getattr(dropped, layer).register_forward_hook(
            lambda module, inputs, output, layer=layer: seen.__setitem__(layer, (inputs[0], output))
        )
    dropped.train()(x)
    for before, after in (("fc1", "fc2"), ("fc2", "fc3")):
        hidden, taken = seen[before][1].clamp(min=0), seen[after][0]
        kept = taken != 0
        torch.testing.assert_close(taken[kept], 2 * hidden[kept])  # what is kept weighs 1 / (1 - 0.5)
        assert kept[hidden > 0].float().mean() == pytest.approx(0.5, abs=0.03)
    if name == "conv-2":
        features = plain.conv2(plain.conv1(x).relu()).relu()
        pooled = nn.functional.max_pool2d(features, 2, ceil_mode=True)
        torch.testing.assert_close(seen["fc1"][0], pooled.flatten(1))  # none after convolutions
    else:
        assert torch.equal(seen["fc1"][0], x.flatten(1))  # none on the input


@pytest.mark.parametrize("way", ["eager", "stacked", "processes"])
def test_dropout_trains_in_every_way_with_pruned_weights_at_zero(way, make_task, make_train):
    if way == "processes" and not forks.possible():
        pytest.skip("processes are for Linux")
    task = make_task(lambda: NETS["lenet-300-100"](input_shape=(12,), num_classes=4, dropout=0.5))
    start = task.start(0)
    masks = {"fc1.weight": torch.rand(300, 12, generator=torch.Generator().manual_seed(0)) < 0.5}
    arms = [Arm(f"arm {seed}", start, masks, seed) for seed in (1, 2)]
    finals = [outcome.final["fc1.weight"] for _, outcome in fit(arms, task, make_train(), way=Way(way, at_once=2))]
    assert all(
        not final[~masks["fc1.weight"]].any() and not torch.equal(final, start["fc1.weight"]) for final in finals
    )
    assert not torch.equal(*finals)
