"""The report: its numbers parsed back and compared with the log's and evaluations'; nothing comes from elsewhere."""

import builtins
import dataclasses
import itertools
import json
import pickle
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import yaml
from safetensors.torch import load_file, save_file

from ticketfind import TicketfindError, attack, charts, figures, intervals, movement, report, results
from ticketfind.arms import Task
from ticketfind.recipe import Recipe
from ticketfind.results import Evaluated, Round
from ticketfind.rundir import RunDir

SVG = "{http://www.w3.org/2000/svg}"


class Page(HTMLParser):
    """Tables as rows of texts by id; every tag with its attributes; the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._rows = "", [[""]]
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._rows = self.tables[str(dict(attrs)["id"])] = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th", "small"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._rows = []

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._rows and self._rows[-1]:
            self._rows[-1][-1] += data.replace("\N{NO-BREAK SPACE}", " ")


def stats(*early: float, stop: float = 9) -> dict[str, Any]:
    def spread(values: tuple[float, ...]) -> dict[str, Any]:
        return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)), "values": [*values]}

    ends = tuple(value - 0.01 for value in early)
    return {
        "accuracy_early": spread(early),
        "accuracy_end": spread(ends),
        "early_stop": spread(tuple(stop + i for i in range(len(early)))),
        "replicates": len(early),
    }


def attacked(**levels: dict[str, tuple[float, ...]]) -> dict[str, Any]:
    """By attack, the accuracies of each arm."""
    return {
        name: {"arms": {arm: {"values": values} for arm, values in arms.items()}, "comparisons": []}
        for name, arms in levels.items()
    }


def evaluation(remaining: float, more: Mapping[str, Any] = MappingProxyType({}), **arms: dict[str, Any]) -> str:
    verdict = "winning: a <b>bold</b> word"
    found = {"ticket": "runs/x", "remaining": remaining, "arms": arms, "verdict": verdict, "notes": [], **more}
    return json.dumps(found)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished small run, searched once."""
    yield tmp_path_factory.mktemp("searched") / "run"


@pytest.fixture
def run(
    searched: Path,
    tmp_path: Path,
    run_search: Callable[..., list[Round]],
    make_recipe: Callable[..., Recipe],
    make_task: Callable[..., Task],
) -> RunDir:
    """A run of three rounds of two replicates, with evaluations of rounds 1 and 3."""
    if not searched.exists():
        run_search(make_recipe(), make_task(), searched)
        evals = searched / "evals"
        evals.mkdir()
        dense, ticket = stats(0.7, 0.72), stats(0.71, 0.73)
        (evals / "01-20260101T000000.json").write_text(
            evaluation(0.7, dense=dense, ticket=ticket, reinit=stats(0.6, 0.65))
        )
        (evals / "03-20260101T000000.json").write_text(
            evaluation(0.343, dense=dense, ticket=ticket, reinit=stats(0.1, 0.2), random=stats(0.3, 0.31))
        )
        noise = {"noise=0.5": stats(0.69, 0.72, stop=8), "noise=1": stats(0.66, 0.68), "dense noise=1": stats(0.5, 0.6)}
        arms = {
            "dense": dense,
            "ticket": ticket,
            "reinit": stats(0.61, 0.62),
            **noise,
            "weight-noise=0.5": stats(0.4, 0.5),
        }
        (evals / "03-20260101T000001.json").write_text(evaluation(0.343, **arms))
    shutil.copytree(searched, tmp_path / "run")
    return RunDir(tmp_path / "run")


_RENDERED: dict[bytes, tuple[str, bytes]] = {}


@pytest.fixture(autouse=True)
def rendered_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[figures.Chart], tuple[str, bytes]]:
    """Most reports here are on one run with a few changes: charts equal in every value are drawn once for all of them.

    Returns what draws for real.
    """
    render = figures.render

    def once(chart: figures.Chart) -> tuple[str, bytes]:
        key = pickle.dumps(chart)
        if key not in _RENDERED:
            _RENDERED[key] = render(chart)
        return _RENDERED[key]

    monkeypatch.setattr(figures, "render", once)
    return render


_SHOWN: dict[Path, report.Written] = {}


@pytest.fixture
def shown(run: RunDir, searched: Path) -> report.Written:
    """The report on the run as it was searched, written once."""
    if searched not in _SHOWN:
        _SHOWN[searched] = report.write(RunDir(searched), searched.parent / "shown.html")
    return _SHOWN[searched]


def finished(run: RunDir) -> list[Round]:
    recipe = run.recipe()
    return results.rounds_of(run.log(), replicates=2, given_tolerance=recipe.run.tolerance)


def cells(measured: results.Stats) -> list[str]:
    early, end = (np.array(values) * 100 for values in (measured.accuracy_early.values, measured.accuracy_end.values))
    return [
        f"{early.mean():.2f} ± {early.std(ddof=1):.2f}",
        f"{end.mean():.2f} ± {end.std(ddof=1):.2f}",
        f"{np.mean(measured.early_stop.values):,.0f}",
    ]


def test_the_tables_have_the_numbers_of_the_log_and_the_evaluations(run: RunDir, shown: report.Written) -> None:
    page = Page(shown.page.read_text(encoding="utf-8"))
    _, *rows = page.tables["rounds"]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    for row, expected in zip(rows, finished(run), strict=True):
        assert [row[2], row[4], row[5]] == cells(expected.stats)
        assert float(row[1].removesuffix(" %")) == pytest.approx(100 * expected.remaining, abs=0.06)
    winner = results.winner_of(finished(run))
    assert winner is not None and rows[winner.round][-1] == "winner"
    found = {row[0]: row for row in page.tables["eval-3"][1:]}
    assert found["reinit"][1] == "61.50 ± 0.71"  # the newest
    assert found["random"][1] == "30.50 ± 0.71"  # which the newest evaluation lacks
    assert found["noise=0.5"][1:] == ["70.50 ± 2.12", "51.44 to 89.56", "69.50 ± 2.12", "8"]
    assert [row[0] for row in page.tables["claims"][1:]] == [str(number) for number in range(1, 13)]


def points(svg: str, name: str) -> np.ndarray:
    """The corners of a line in a figure, as it is drawn: [n, 2]."""
    (group,) = [g for g in ET.fromstring(svg).iter(f"{SVG}g") if (g.get("id") or "").endswith(name)]
    path = group.find(f"{SVG}path")
    assert path is not None
    return np.array([[float(x) for x in pair] for pair in re.findall(r"[ML] (\S+) (\S+)", path.get("d", ""))])


def test_the_lines_are_where_the_numbers_are(run: RunDir, shown: report.Written) -> None:
    svg = shown.figures[0].read_text(encoding="utf-8")
    drawn, rounds = points(svg, "line-0-ticket"), finished(run)
    shares = np.log([r.remaining for r in rounds])
    heights = np.array([r.stats.accuracy_early.mean for r in rounds])
    assert np.ptp(heights) > 0.01
    for axis, values in enumerate((shares, heights)):  # one line through all: the axes are linear in these
        slope, start = np.polyfit(values, drawn[:, axis], 1)
        assert np.abs(slope * values + start - drawn[:, axis]).max() < 0.01
        assert slope < 0  # 100 % is on the left, and higher is better
    reinit = points(svg, "line-0-reinit")
    assert reinit[:, 0] == pytest.approx(drawn[[1, 3], 0], abs=2)


def test_the_figures_that_there_are_numbers_for(shown: report.Written) -> None:
    names = ["hill", "early-stop", "curves", "layers", "noise", "weight-noise", "movement", "initial"]
    assert [path.name for path in shown.figures] == [f"{name}.{kind}" for name in names for kind in ("svg", "png")]
    for path in shown.figures:
        head = path.read_bytes()[:8]
        assert head == b"\x89PNG\r\n\x1a\n" if path.suffix == ".png" else head.startswith(b"<svg")
    page = shown.page.read_text(encoding="utf-8")
    assert page.count("<figure") == len(names)


ATTACKED = attacked(
    **{
        "pgd:0.1": {"ticket": (0.2, 0.98), "dense": (0.1, 0.12)},
        "clean": {"ticket": (0.7, 0.72), "dense": (0.6, 0.64), "reinit": (0.5, 0.5)},
        "fgsm:0.1": {"ticket": (0.4, 0.5), "dense": (0.3, 0.36)},
        "fgsm:1e-05": {"ticket": (0.7, 0.7)},
        "fgsm:0.05": {"ticket": (0.6, 0.61), "dense": (0.5, 0.51)},
    }
)


def test_accuracy_under_attack_is_drawn_and_told(run: RunDir) -> None:
    arms = {"dense": stats(0.7, 0.72), "ticket": stats(0.71, 0.73)}
    for file, more in (("03-20260102T000000", {"attacks": ATTACKED}), ("03-20260103T000000", {"attacks": {}})):
        (run.evals_folder / f"{file}.json").write_text(evaluation(0.343, more, **arms))
    written = report.write(run)
    drawn = {path.stem: path.read_text(encoding="utf-8") for path in written.figures if path.suffix == ".svg"}
    ticket, dense = points(drawn["fgsm"], "line-0-ticket"), points(drawn["fgsm"], "line-0-dense")
    assert "line-0-reinit" not in drawn["fgsm"]  # it was not attacked so
    epsilons = [0, 1e-5, 0.05, 0.1, 0, 0.05, 0.1]
    for axis, values in enumerate((epsilons, [0.71, 0.7, 0.605, 0.45, 0.62, 0.505, 0.33])):
        at = np.concatenate([ticket, dense])[:, axis]
        slope, start = np.polyfit(values, at, 1)
        assert np.abs(slope * np.array(values) + start - at).max() < 0.01
    assert len(points(drawn["pgd"], "line-0-ticket")) == 2

    table = Page(written.page.read_text(encoding="utf-8")).tables["attacks-3"]
    assert table[0] == ["", "ticket", "dense", "reinit", "ticket above dense by"]
    assert [row[0] for row in table[1:]] == ["clean", "fgsm:1e-05", "fgsm:0.05", "fgsm:0.1", "pgd:0.1"]
    assert table[2] == ["fgsm:1e-05", "70.00 ± 0.00", "", "", ""]
    welch = scipy.stats.ttest_ind([40, 50], [30, 36], equal_var=False).confidence_interval(0.95)
    assert table[4][:4] == ["fgsm:0.1", "45.00 ± 7.07", "33.00 ± 4.24", ""]
    assert table[4][4] == f"+12.00 ({welch.low:+.2f} to {welch.high:+.2f})"


def test_bands_of_accuracy_end_at_a_hundred_percent_and_at_none() -> None:
    spread = results.Spread.of([0.2, 0.98])
    bounds = intervals.of_mean(spread.values)
    assert bounds is not None and bounds.low < 0 and bounds.high > 1
    at = Evaluated(1, 0.5, {}, {"clean": {"ticket": spread}, "pgd:1": {"ticket": spread}})
    ((panel,),) = [chart.panels for chart in charts._under_attack([at], "")]
    (line,) = [figures._within(line, panel.limits) for line in panel.lines]
    assert (line.low, line.high) == ([0.0, 0.0], [100.0, 100.0])


def test_an_attack_that_no_arm_has_has_no_figure() -> None:
    half = results.Spread.of([0.5, 0.6])
    at = Evaluated(1, 0.5, {}, {"clean": {"ticket": half}, "pgd:1": {"against": half}, "fgsm:1": {}})
    assert [*charts._under_attack([at], "")] == []


def test_the_caption_says_which_examples_were_attacked() -> None:
    attacks = {"pgd:1": {"ticket": results.Spread.of([0.5, 0.6])}}
    some, few = (Evaluated(1, share, {}, attacks, n, (-1, 2.5)) for share, n in ((0.5, 1000), (0.25, 40)))
    said = "the same {} test examples (inputs from -1 to 2.5)"
    for found, expected in (
        ([some], f"Of {said.format('1,000')}, changed"),
        ([some, dataclasses.replace(some, remaining=0.1)], f"Of {said.format('1,000')}, changed"),
        ([some, few], f"Of {said.format('1,000')} at 50 % of the weights, {said.format('40')} at 25 % of the weights,"),
        ([Evaluated(1, 0.5, {}, attacks)], "Of the same test examples, changed"),
    ):
        (chart,) = charts._under_attack(found, "")
        assert chart.caption.startswith(expected)


def test_the_title_says_how_pgd_goes() -> None:
    at = Evaluated(1, 0.5, {}, {"pgd:1": {"ticket": results.Spread.of([0.5, 0.6])}})
    (chart,) = charts._under_attack([at], "")
    assert f"{attack.STEPS} steps of epsilon / {1 / attack.STEP:g} " in chart.title


def bands(svg: str) -> list[np.ndarray]:
    """The corners of each band of a figure, in the order of its lines: [n, 2] each."""
    found = []
    for group in ET.fromstring(svg).iter(f"{SVG}g"):
        if "PolyCollection" in (group.get("id") or ""):
            path, use = next(group.iter(f"{SVG}path")), next(group.iter(f"{SVG}use"))
            corners = [[float(x) for x in pair] for pair in re.findall(r"[ML] (\S+) (\S+)", path.get("d", ""))]
            found.append(np.array(corners) + [float(use.get(axis, 0)) for axis in "xy"])
    return found


T_OF_TWO = 12.7062
"""Student's t, 97.5 %, one degree of freedom."""


OF_ONES_OWN = {"train__metric": "my.metrics:minus_mse"}, {"train__trainer": "my.loop:train"}


@pytest.mark.parametrize("changes", [{}, *OF_ONES_OWN])
def test_only_bands_of_accuracies_are_cut(run: RunDir, changes: dict[str, str]) -> None:
    lines = run.log_file.read_text(encoding="utf-8").splitlines()
    for place, line in enumerate(lines):  # near both ends
        if "accuracy_early" in (told := json.loads(line)):
            told["accuracy_early"] = (0.97, 0.03, 0.5)[told["round"] % 3] + 0.02 * told["replicate"]
            lines[place] = json.dumps(told)
    run.log_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    svg = report.write(rewritten(run, **changes)).figures[0].read_text(encoding="utf-8")
    values = np.array([r.stats.accuracy_early.values for r in finished(run)])
    means, halves = values.mean(1), T_OF_TWO * np.ptp(values, axis=1) / 2
    low, high = means - halves, means + halves
    assert low.min() < 0 and high.max() > 1
    if not changes:
        low, high = np.clip(low, 0, 1), np.clip(high, 0, 1)
    drawn, band = points(svg, "line-0-ticket"), bands(svg)[0]
    slope, start = np.polyfit(drawn[:, 1], means, 1)
    for place, x in enumerate(drawn[:, 0]):
        heights = slope * band[np.abs(band[:, 0] - x) < 1e-4, 1] + start
        assert heights.min() == pytest.approx(low[place], abs=1e-3)
        assert heights.max() == pytest.approx(high[place], abs=1e-3)


LEVELS = {"attack_examples": 400, "attack_range": [0.0, 1.0], "trials": 2, "seed": 7}
"""The settings of an evaluation."""


def under_attack(run: RunDir, *evaluations: dict[str, Any]) -> tuple[report.Written, dict[str, np.ndarray], Page]:
    """A report with evaluations of round 3, oldest first; the ticket's line in each figure that has one; the page."""
    arms = {"dense": stats(0.7, 0.72), "ticket": stats(0.71, 0.73)}
    for day, more in enumerate(evaluations, 2):
        (run.evals_folder / f"03-2026010{day}T000000.json").write_text(evaluation(0.343, more, **arms))
    written = report.write(run)
    drawn = {path.stem: path.read_text(encoding="utf-8") for path in written.figures if path.suffix == ".svg"}
    lines = {name: points(drawn[name], "line-0-ticket") for name in ("fgsm", "pgd") if name in drawn}
    return written, lines, Page(written.page.read_text(encoding="utf-8"))


def test_attacks_of_several_days_stand_together(run: RunDir) -> None:
    first = attacked(
        clean={"ticket": (0.9, 0.9), "one-shot": (0.7, 0.7), "against": (0.6, 0.6)},
        **{
            "fgsm:0.2": {"ticket": (0.3, 0.3), "one-shot": (0.2, 0.2), "against": (0.1, 0.1)},
            "pgd:0.3": {"ticket": (0.2, 0.2)},
        },
    )
    second = attacked(
        clean={"ticket": (0.9, 0.9)}, **{"fgsm:0.1": {"ticket": (0.6, 0.6)}, "pgd:0.3": {"ticket": (0.25, 0.25)}}
    )
    other = LEVELS | {"attacks": attacked(clean={"ticket": (0, 0)}, **{"pgd:0.3": {"ticket": (0, 0)}}), "seed": 8}
    written, lines, page = under_attack(run, LEVELS | {"attacks": first}, other, LEVELS | {"attacks": second})
    assert [row[:3] for row in page.tables["attacks-3"]] == [
        ["", "ticket", "one-shot"],  # and no other ticket's
        ["clean", "90.00 ± 0.00", "70.00 ± 0.00"],
        ["fgsm:0.1", "60.00 ± 0.00", ""],
        ["fgsm:0.2", "30.00 ± 0.00", "20.00 ± 0.00"],
        ["pgd:0.3", "25.00 ± 0.00", ""],
    ]
    assert written.notes == []  # what is superseded is not missed
    drawn = lines["fgsm"]
    for axis, values in enumerate((np.array([0, 0.1, 0.2]), np.array([0.9, 0.6, 0.3]))):
        slope, start = np.polyfit(values, drawn[:, axis], 1)
        assert np.abs(slope * values + start - drawn[:, axis]).max() < 0.01
    (caption,) = [str(tag["aria-label"]) for name, tag in page.tags if name == "table" and tag["id"] == "attacks-3"]
    assert "on the same 400 test examples (inputs from 0 to 1)," in caption


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attack_examples": 40}, "examples 40, not 400."),
        ({"trials": 1, "seed": 5}, "trials 1, not 2; seed 5, not 7."),
        ({"attack_examples": None}, "examples not known."),
    ],
)
def test_attacks_that_do_not_compare_are_left_out_and_it_is_said(
    run: RunDir, changes: dict[str, int | None], says: str
) -> None:
    older = attacked(clean={"ticket": (0.9, 0.9)}, **{"pgd:0.3": {"ticket": (0.3, 0.3)}})
    newer = attacked(
        clean={"ticket": (0.8, 0.8)}, **{"fgsm:0.2": {"ticket": (0.1, 0.1)}, "fgsm:0": {"ticket": (0.8, 0.8)}}
    )
    written, lines, page = under_attack(
        run, LEVELS | changes | {"attacks": older}, LEVELS | {"attacks": newer}, LEVELS | {"attacks": {}}
    )
    assert [*lines] == ["fgsm"] and len(lines["fgsm"]) == 2  # none is drawn once
    assert [row[:2] for row in page.tables["attacks-3"][1:]] == [
        ["clean", "80.00 ± 0.00"],
        ["fgsm:0", "80.00 ± 0.00"],
        ["fgsm:0.2", "10.00 ± 0.00"],
    ]
    (note,) = written.notes
    assert note == f"Round 3: pgd:0.3 of an earlier evaluation cannot stand beside the newest and is left out: {says}"
    assert note in page.text


def test_attacks_of_other_numbers_of_trials_of_one_ticket_do_not_compare(run: RunDir) -> None:
    """Each of which counts as a replicate: `trials` is 1 in both."""
    for day, (name, *values) in enumerate((("fgsm:0.1", 0.3, 0.4, 0.5), ("fgsm:0.2", 0.3, 0.4)), 2):
        found = LEVELS | {"trials": 1, "attacks": attacked(clean={"ticket": values}, **{name: {"ticket": values}})}
        file = run.evals_folder / f"03-2026010{day}T000000.json"
        file.write_text(evaluation(0.343, found, ticket=stats(*values)))
    written = report.write(run)
    page = Page(written.page.read_text(encoding="utf-8"))
    assert [row[0] for row in page.tables["attacks-3"][1:]] == ["clean", "fgsm:0.2"]
    assert [note.partition("left out: ")[2] for note in written.notes] == ["replicates 3, not 2."]


def test_evaluations_that_do_not_say_their_settings_stand_alone(run: RunDir) -> None:
    """Those of earlier versions: whether two are of the same examples is not known, though both say as little."""
    older, newer = (
        {"trials": 2, "attacks": attacked(clean={"ticket": (0.9, 0.9)}, **{name: {"ticket": (0.3, 0.3)}})}
        for name in ("fgsm:0.1", "fgsm:0.2")
    )
    written, lines, page = under_attack(run, older, newer)
    assert [row[0] for row in page.tables["attacks-3"][1:]] == ["clean", "fgsm:0.2"] and len(lines["fgsm"]) == 2
    assert written.notes[0].endswith("left out: examples not known; seed not known.")


def test_the_same_run_gives_the_same_report(
    shown: report.Written, searched: Path, rendered_once: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "render", rendered_once)
    before = {path: path.read_bytes() for path in (shown.page, *shown.figures)}
    report.write(RunDir(searched), shown.page)
    assert {path: path.read_bytes() for path in before} == before


def test_movement_and_initial_weights_are_those_of_the_files(run: RunDir) -> None:
    found = movement.of_run(run, 3, [0, 1])
    for replicate, (kept, pruned) in enumerate(found.means):
        start, end, masks = (
            load_file(run.path / name)
            for name in (
                f"init/{replicate}.safetensors",
                f"trained/{replicate}.safetensors",
                f"masks/03-{replicate}.safetensors",
            )
        )
        distance = torch.cat([(end[name].double() - start[name]).abs()[mask] for name, mask in masks.items()])
        others = torch.cat([(end[name].double() - start[name]).abs()[~mask] for name, mask in masks.items()])
        assert (kept, pruned) == pytest.approx((float(distance.mean()), float(others.mean())))
    fc1 = found.initial["fc1.weight"]
    wide = fc1.centers[1] - fc1.centers[0]
    assert sum(fc1.one) * wide == pytest.approx(1) and sum(fc1.other) * wide == pytest.approx(1)
    mask, start = load_file(run.mask_file(3, 0))["fc1.weight"], load_file(run.start_file(0))["fc1.weight"]
    for shown, values in ((fc1.one, start[mask]), (fc1.other, start)):
        expected, _ = np.histogram(values.numpy(), len(shown), (float(start.min()), float(start.max())), density=True)
        np.testing.assert_allclose(shown, expected, rtol=1e-4)


def test_trained_weights_are_those_of_the_dense_network(run: RunDir) -> None:
    for replicate in range(2):
        state = load_file(run.trained_file(replicate))
        assert state.keys() == load_file(run.start_file(replicate)).keys()
        first, initial = load_file(run.mask_file(1, replicate)), state["fc1.weight"].abs()
        kept = first["fc1.weight"]
        assert initial[kept].min() >= initial[~kept].max()  # magnitudes at the end of round 0 drew round 1's mask


def test_with_learning_rate_rewinding_the_start_is_that_of_round_0(run: RunDir) -> None:
    before = movement.of_run(run, 3, [0, 1])
    for replicate in range(2):
        run.start_file(replicate).rename(run.start_file(replicate, 0))
    assert movement.of_run(run, 3, [0, 1]) == before


def rewritten(run: RunDir, **changes: Any) -> RunDir:
    """The run with other values of some sections of its recipe, as if it had been searched so."""
    plain = yaml.safe_load(run.recipe_file.read_text(encoding="utf-8"))
    for key, value in changes.items():
        section, name = key.split("__")
        plain[section][name] = value
    run.recipe_file.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
    return run


def test_a_measure_of_ones_own_is_not_called_accuracy(run: RunDir) -> None:
    found = report.write(rewritten(run, train__metric="my.metrics:F1"))
    text = found.page.read_text(encoding="utf-8")
    assert "test metric (my.metrics:F1) at early stop" in text and "test accuracy" not in text.lower()


def test_what_learning_rate_rewinding_and_foreign_weights_leave_unknown(run: RunDir) -> None:
    for change in ({"prune__rewind": "lr"}, {"model__trained": "trained.pt"}):
        judged = report.write(rewritten(run, **change)).claims
        assert judged[1].status == "not tested" and "stops" in judged[1].figures
    assert "from the initialization (lr) to the end" in (run.report_file).read_text(encoding="utf-8")


def test_weights_that_have_not_moved_are_a_distribution_too(run: RunDir) -> None:
    shutil.copy(run.start_file(0), run.trained_file(0))
    found = movement.of_run(run, 3, [0])
    assert found.means == [(0.0, 0.0)] and found.moved is not None
    assert max(found.moved.one) == max(found.moved.other) == pytest.approx(movement.BINS), "all in the first bin of 40"


def test_the_replicates_that_bands_are_of_are_counted() -> None:
    def finished(number: int, *values: float) -> Round:
        spread = results.Spread.of(values)
        return Round(number, 0.8**number, results.Stats(spread, spread, spread), True, 0)

    two, one = finished(0, 0.5, 0.6), finished(1, 0.5)
    assert charts._over([two, two]) == "Bands and bars: 95 % intervals of the mean over 2 replicates."
    assert charts._over([two, one]) == "Bands and bars: 95 % intervals of the mean over 1 to 2 replicates."
    assert charts._over([one]) == "One replicate."


def test_bfloat16_is_left_out_with_a_word(run: RunDir) -> None:
    for replicate in range(2):
        state = load_file(run.start_file(replicate))
        save_file({name: value.bfloat16() for name, value in state.items()}, run.start_file(replicate))
    written = report.write(run)
    assert "initial.svg" not in [path.name for path in written.figures]
    assert "BF16" in written.notes[0] and "BF16" in written.page.read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------- incomplete runs


def test_an_unfinished_run_without_evaluations(run: RunDir) -> None:
    shutil.rmtree(run.evals_folder)
    shutil.rmtree(run.path / "trained")
    run.finished_file.unlink()
    run.ticket_file.unlink()
    lines = run.log_file.read_text().splitlines()
    run.log_file.write_text("\n".join(lines[:3]) + "\n")  # round 0, and one replicate of round 1
    written = report.write(run)
    page = Page(written.page.read_text(encoding="utf-8"))
    assert len(page.tables["rounds"]) == 2 and "not finished" in page.text
    assert "No pruned round was trained so far." in page.text
    assert "Not evaluated" in page.text and "holds no trained weights" in page.text


def test_no_winner(run: RunDir) -> None:
    lines = [json.loads(line) for line in run.log_file.read_text().splitlines()]
    for line in lines:
        line["accuracy_early"] = 0.9 if line["round"] == 0 else 0.1
    run.log_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = run.recipe_file.read_text()
    run.recipe_file.write_text(recipe.replace("tolerance: 100", "tolerance: 1"))
    assert "No winner" in Page(report.write(run).page.read_text(encoding="utf-8")).text


def test_a_run_without_a_finished_round(run: RunDir) -> None:
    run.log_file.write_text("")
    with pytest.raises(TicketfindError, match="no round has finished"):
        report.write(run)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("03-x.json", "{", "expected the JSON object"),
        ("03-x.json", "[]", "remaining"),
        ("03-x.json", "[" * 100_000, "expected the JSON object"),
        ("03-x.json", '{"remaining": 0.5, "arms": {}}', "verdict"),
        ("03-x.json", '{"remaining": NaN, "arms": {}, "verdict": ""}', "remaining"),
        ("03-x.json", evaluation(0.5, ticket={}), "accuracy_early.values"),
        ("03-x.json", evaluation(0.5, ticket=stats(0.5, 0.6) | {"early_stop": {"values": [1]}}), "as many values"),
        ("03-x.json", evaluation(0.5, ticket=stats(0.5, 1e15)), "accuracy_early.values"),
        ("best.json", evaluation(0.5, ticket=stats(0.5, 0.6)), "NN-TIME.json"),
        ("03-x.json", evaluation(0.5, {"seed": 0.5}, ticket=stats(0.5, 0.6)), "expected whole numbers, or null"),
        ("03-x.json", evaluation(0.5, {"attack_range": [0]}, ticket=stats(0.5, 0.6)), "attack_range: expected two"),
        ("03-x.json", evaluation(0.5, {"attacks": []}, ticket=stats(0.5, 0.6)), "attacks: expected an object"),
        ("03-x.json", evaluation(0.5, {"attacks": {"clean": {"arms": 3}}}, ticket=stats(0.5, 0.6)), "each with arms"),
        ("03-x.json", evaluation(0.5, {"attacks": attacked(clean={"a": ()})}, ticket=stats(0.5, 0.6)), "a.values"),
    ],
)  # fmt: skip
def test_a_bad_evaluation_is_one_line(run: RunDir, name: str, text: str, expected: str) -> None:
    (run.evals_folder / name).write_text(text)
    with pytest.raises(TicketfindError, match=re.escape(expected)) as error:
        report.write(run)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_log_with_numbers_beyond_reckoning_is_one_line(run: RunDir) -> None:
    run.log_file.write_text(run.log_file.read_text().replace('"accuracy_early": ', '"accuracy_early": 1e200, "x": '))
    with pytest.raises(TicketfindError, match=r"accuracy_early: expected a number"):
        report.write(run)


def test_weights_that_do_not_fit_are_one_line(run: RunDir) -> None:
    save_file({"fc1.weight": torch.zeros(3)}, run.trained_file(0))
    with pytest.raises(TicketfindError, match=r"fit the mask|the same parameters"):
        report.write(run)


# ------------------------------------------------------------------------------------------- the page


HOSTILE = '<script>alert(1)</script>"><img src=http://x.invalid/y>'


def test_nothing_comes_from_elsewhere_and_nothing_runs(run: RunDir) -> None:
    lines = [json.loads(line) for line in run.log_file.read_text().splitlines()]
    for line in lines:
        line["kept_per_tensor"] = {HOSTILE: line["kept"], "$a$\x1b": line["kept"], **line["kept_per_tensor"]}
    run.log_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arms = {"ticket": stats(0.5, 0.6), HOSTILE: stats(0.5, 0.6)}
    (run.evals_folder / "03-20270101T000000.json").write_text(evaluation(0.343, **arms))
    recipe = run.recipe_file.read_text()
    run.recipe_file.write_text(recipe.replace("spec: tests:tiny", f"spec: {json.dumps(HOSTILE)}"))
    assert run.recipe().model.spec == HOSTILE
    written = report.write(run)
    text = written.page.read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "img", "link", "iframe", "object", "b "} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "style", "action", "data"):
                assert "//" not in (value or "") and (name == "style" or (value or "").startswith("#"))
    assert not re.search(r"@import|url\((?!#)|\x1b", text)
    assert HOSTILE in page.text and "<b>bold</b>" in page.text
    for path in written.figures:
        if path.suffix == ".svg":
            tree = ET.fromstring(path.read_text(encoding="utf-8"))
            assert not [node for node in tree.iter() if node.tag in (f"{SVG}script", f"{SVG}image")]


def test_names_in_a_page_are_not_used_twice(shown: report.Written) -> None:
    page = Page(shown.page.read_text(encoding="utf-8"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len({*ids})
    targets = {value[1:] for _, a in page.tags if (value := a.get("xlink:href") or "")}
    assert targets and targets <= {*ids}


def test_every_color_has_one_for_the_dark() -> None:
    for color in {*figures.COLORS.values(), *figures.SERIES, figures.INK, figures.FAINT}:
        assert f'[style*="fill: {color}"]' in figures.DARK_RULES


def test_svgs_use_no_color_that_dark_rules_do_not_know(shown: report.Written) -> None:
    known = set(re.findall(r"#[0-9a-f]{6}", figures.DARK_RULES))
    for path in shown.figures:
        if path.suffix == ".svg":
            _, _, drawing = path.read_text(encoding="utf-8").partition("</style>")
            drawing = re.sub(r"<clipPath.*?</clipPath>", "", drawing, flags=re.DOTALL)
            assert set(re.findall(r"#[0-9a-f]{6}\b", re.sub(r'(id|href)="[^"]*"', "", drawing))) <= known, path


@pytest.mark.parametrize(
    ("heights", "gap"), [([0.1, 0.1, 0.1], 0.1), ([0, 0.05, 0.5, 0.51], 0.1), ([0.3], 0.2), ([], 1)]
)
def test_names_are_spread_out(heights: list[float], gap: float) -> None:
    places = figures.spread_out(heights, gap)
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(places))
    assert sum(places) == pytest.approx(sum(heights))
    assert max((abs(a - b) for a, b in zip(places, heights, strict=True)), default=0) < 2 * gap


def test_a_curve_that_is_none_is_one_line() -> None:
    line = {"round": 0, "replicate": 0, "curve": {"iteration": [2, 1], "test_accuracy": [0.5, "x"]}}
    with pytest.raises(TicketfindError, match="curve"):
        charts.curves([line], 0)


# --------------------------------------------------------------------------------- beside another run


def with_dropout(run: RunDir, path: Path, change: float, **changes: object) -> RunDir:
    """A copy of a run with other keys in its recipe and accuracies that are higher by `change` in pruned rounds."""
    shutil.copytree(run.path, path)
    other = RunDir(path)
    recipe = yaml.safe_load(run.recipe_file.read_text(encoding="utf-8"))
    for key, value in changes.items():
        section, name = key.split("__")
        recipe[section][name] = value
    other.recipe_file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    lines = [json.loads(line) for line in run.log_file.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line["accuracy_early"] = 0.5 + change * (1 + (line["round"] > 0)) + 0.001 * line["replicate"]
    other.log_file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return other


@pytest.mark.parametrize(("change", "expected"), [(0.2, "holds"), (-0.2, "does not"), (0.0, "undecided")])
def test_dropout_beside_none_whichever_is_asked_for(run: RunDir, tmp_path: Path, change: float, expected: str) -> None:
    plain = with_dropout(run, tmp_path / "plain", 0.0)
    dropped = with_dropout(run, tmp_path / "dropped", change, model__args={"dropout": 0.5}, run__seed=7)
    sides = [report.write(*pair) for pair in ((dropped, None, plain), (plain, None, dropped))]
    claim, other = (side.claims[10] for side in sides)
    assert claim == other and claim.status == expected
    assert [c.number for c in sides[0].claims] == [*range(1, 13)]
    assert f"dropout of 0.5 changes the dense network by {100 * change:+.2f} points" in claim.figures
    assert report.write(dropped).claims[10].status == "not tested"


def test_other_searches_are_not_put_beside(run: RunDir, tmp_path: Path) -> None:
    other = with_dropout(run, tmp_path / "lr", 0.0, model__args={"dropout": 0.5}, train__lr=0.3)
    with pytest.raises(TicketfindError, match=r"nothing else that differs, found train.lr: 0.3 there, 0.05 here"):
        report.write(run, None, other)
    same = with_dropout(run, tmp_path / "same", 0.0)
    with pytest.raises(TicketfindError, match=r"in one of the two runs, none in the other, found 0 in .* and 0 here"):
        report.write(run, None, same)


# ----------------------------------------------------------------------------------------- the command


def test_the_command(run: RunDir, command: Callable[..., Any], tmp_path: Path) -> None:
    found = command("report", run.path, "--json").json
    assert found.keys() == {"run", "report", "figures", "claims", "seconds"}
    assert Path(found["report"]) == run.report_file and all(Path(path).is_file() for path in found["figures"])
    shown = command("report", run.path, "--out", tmp_path / "other.html")
    assert shown.code == 0 and (tmp_path / "other.html").is_file() and "not tested" in shown.out
    assert (tmp_path / "other-figures" / "hill.png").is_file()
    assert command("report", run.ticket_file).err.startswith("error: ")
    dropped = with_dropout(run, tmp_path / "dropped", 0.2, model__args={"drop_rate": 0.1})
    beside = command("report", with_dropout(run, tmp_path / "plain", 0.0).path, "--beside", dropped.path, "--json").json
    assert beside["claims"][10]["status"] == "holds" and "dropout of 0.1" in beside["claims"][10]["figures"]
    assert "expected a run directory, found a file" in command("report", run.path, "--beside", run.ticket_file).err


def test_without_matplotlib_one_line_says_what_to_install(
    run: RunDir, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *more: Any, **keys: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *more, **keys)

    monkeypatch.setattr(builtins, "__import__", without)
    ran = command("report", run.path)
    assert ran.code == 1 and ran.err.count("\n") == 1 and "pip install 'ticketfind[plots]'" in ran.err
    assert not run.report_file.exists()
