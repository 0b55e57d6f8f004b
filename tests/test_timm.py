"""Families of timm of every kind, through a search and back from its files: `tests/timm_sweep.py`'s check.

The sweep takes all of timm's families; here are small members, or members made small, at sizes known to work.
"""

from typing import Any

import pytest
from timm_sweep import SIZES, Report, check, markdown, put_into, smallest_images, survey, totals

from ticketfind.scores import SCORES

SAMPLE: list[tuple[str, dict[str, Any], int, set[str]]] = [
    ("test_resnet", {}, 32, {"conv", "linear"}),
    ("test_vit", {}, 32, {"conv", "linear"}),
    ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4]}, 64, {"conv", "linear"}),
    ("test_convnext", {}, 32, {"conv", "depthwise", "linear"}),
    ("test_efficientnet", {}, 32, {"conv", "depthwise", "linear"}),
    ("mobilenetv3_small_050", {}, 32, {"conv", "depthwise", "linear"}),
    ("test_nfnet", {}, 32, {"conv", "grouped", "linear"}),
    ("gmlp_ti16_224", {}, 32, {"conv", "linear"}),
    ("levit_128s", {"depth": [1, 1, 1], "embed_dim": [32, 48, 64], "num_heads": [2, 3, 4]}, 64, {"conv", "linear"}),
    ("efficientformerv2_s0", {}, 64, {"conv", "depthwise", "linear"}),
    ("regnetx_002", {}, 32, {"conv", "grouped", "linear"}),
    ("densenet121", {"growth_rate": 8, "block_config": [2, 2, 2, 2]}, 32, {"conv", "linear"}),
    ("vgg11_bn", {"mlp_ratio": 0.02}, 32, {"conv", "linear"}),
    ("crossvit_tiny_240", {"depth": [[1, 1, 0]]}, 240, {"conv", "linear"}),
    ("cait_xxs24_224", {"depth": 2}, 32, {"conv", "linear"}),
    ("test_coatnet", {}, 32, {"conv", "depthwise", "linear"}),
    ("xcit_nano_12_p16_224", {"depth": 2}, 32, {"conv", "depthwise", "linear"}),
]


@pytest.mark.parametrize(("member", "args", "size", "kinds"), SAMPLE, ids=[member for member, *_ in SAMPLE])
def test_a_search_and_its_ticket(member, args, size, kinds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = check(member, tmp_path, args=args, size=size)
    assert report.error is None
    assert report.one_channel == ""
    assert report.kinds.keys() == kinds
    assert report.prunable > 0.9 * report.parameters
    assert not report.idle


def test_a_failure_is_a_report_and_not_an_error(tmp_path):
    report = check("efficientformer_l1", tmp_path, args={"embed_dims": [16, 32, 48, 64]}, size=64)  # 224 px or nothing
    assert report.error is not None and "must match the size" in report.error
    assert "1 families tried, 0 passed, 1 failed\n-  (efficientformer_l1): round 0" in totals([report])


@pytest.mark.parametrize(
    ("target", "replacement", "message"),
    [
        ("ticketfind.lanes.masked", lambda start, masks: dict(start), "does not begin at the rewind point"),
        ("ticketfind.lanes.Lane.states", lambda lane: [lane._model.state_dict()], "the rewind point is not the init"),
        ("ticketfind.ticket.Ticket.weights", lambda ticket: ticket.init, "the ticket file gives another model"),
        ("timm_sweep.SCORES", {"magnitude": SCORES["random"]}, "is pruned, one of"),
    ],
)
def test_what_is_wrong_is_found(target, replacement, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(target, replacement)
    assert message in str(check("test_resnet", tmp_path, size=32).error)


def test_a_head_that_starts_near_zero_is_pruned_layer_by_layer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = check("vit_tiny_patch16_224", tmp_path, args={"depth": 1, "embed_dim": 24, "weight_init": "jax"}, size=32)
    assert (report.error, report.scope) == (None, "layer")
    assert report.prunable == 16 * 16 * 3 * 24 + (3 + 1 + 4 + 4) * 24 * 24 + 24 * 7  # patches, block, head
    assert any("no weight is left in head.weight" in note for note in report.notes)


def test_the_smallest_images():
    assert smallest_images("crossvit_tiny_240", {"depth": [[1, 1, 0]]}) == next(s for s in SIZES if s >= 120)


def test_members_are_counted_without_being_run():
    plain, *_, gathered = survey("resnetv2")
    assert (plain.member, gathered.member) == ("resnetv2_18", "resnetv2_152x4_bit")
    assert (plain.standardized, gathered.standardized) == (0, 50 * 3 + 4 + 1)  # 50 blocks, 4 downsamplings, the stem
    assert all(0.99 < report.prunable / report.parameters < 1 for report in (plain, gathered))


def test_the_table_is_put_into_its_page(tmp_path):
    page = tmp_path / "models.md"
    page.write_text("before\n<!-- begin: python tests/timm_sweep.py --markdown -->\nold\n<!-- end -->\nafter\n")
    done = Report(family="f", member="m", args={"depth": 2}, size=32, parameters=1000, prunable=900, kinds={"conv": 3})
    put_into(page, markdown([done]))
    text = page.read_text()
    assert text.startswith("before\n<!-- begin") and text.endswith("<!-- end -->\nafter\n") and "old" not in text
    assert "| f | m, depth=2 | 1,000 | 90.0% | 3 conv | 32 | passed |" in text
    assert "1 families tried, 1 passed, 0 failed" in text
