"""One small member of every family of timm, through a search and back from its files.

    python tests/timm_sweep.py [--family NAME ...] [--jobs 1] [--limit 600] [--json FILE] [--markdown FILE]

A family is a module of timm.models. Its member with the fewest parameters (and those of `FURTHER`) is built as
ticketfind builds it, for the smallest images that it takes; then a real search of one round is checked step by step
(`check` says what). Each has a process of its own, which is ended after --limit seconds. Exits with 1 if one failed.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ticketfind import TicketfindError, forks, models, outputs, plan, prunable, search
from ticketfind.arms import Arm, Outcome, Task, Work
from ticketfind.batches import Data, Split
from ticketfind.devices import EAGER
from ticketfind.layers import from_layers
from ticketfind.masks import Masks
from ticketfind.recipe import Recipe
from ticketfind.results import Round
from ticketfind.rundir import RunDir
from ticketfind.scores import SCORES
from ticketfind.ticket import load_ticket, write_as
from ticketfind.train import fit

SIZES = (32, 56, 64, 96, 112, 120, 128, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512)
"""Sides of the square images that are tried, in this order."""
CLASSES, BATCH, FRACTION, ITERATIONS = 7, 4, 0.2, 2
SHRUNK: dict[str, dict[str, Any]] = {
    "deepseek_vit_412m": {"depth": 2},
    "gemma4_vit_167m": {"depth": 2},
}
"""Arguments for the members that are too large for a sweep even as the smallest of their family."""

FURTHER = {
    "botnet26t_256": "attention with relative positions among convolutions",
    "deit_tiny_distilled_patch16_224": "two heads, for distillation",
    "efficientvim_m1_dist": "heads at several depths",
    "ese_vovnet39b_evos": "EvoNorm",
    "fastvit_mci0": "branches that are merged for inference",
    "lambda_resnet26t": "lambda layers",
    "mixnet_s": "kernels of several sizes in one layer",
    "mobileone_s0": "branches that are merged for inference",
    "pit_ti_distilled_224": "two heads, for distillation",
    "resnetv2_50x1_bit": "standardized convolutions",
    "test_vit3": "register tokens, attention pooling",
    "tf_efficientnet_cc_b0_4e": "convolutions mixed from experts (CondConv)",
    "vit_dpwee_patch16_reg1_gap_256": "attention and MLP side by side, each twice",
}
"""Members that are taken beside the smallest ones, and for what."""

State = dict[str, Tensor]


@dataclass(kw_only=True)
class Report:
    """What was found for one member. Fields that a failure came before keep their defaults."""

    family: str = ""
    member: str
    args: dict[str, Any]
    size: int | None = None
    """Side of the images, in pixels."""
    parameters: int = 0
    prunable: int = 0
    """Weights that are pruned, of `parameters`."""
    kinds: dict[str, int] = field(default_factory=dict)
    """Kind of layer -> its tensors that are pruned."""
    standardized: int = 0
    """Pruned tensors of convolutions that standardize their weight, where zeros do not stay zero."""
    whole: dict[str, int] = field(default_factory=dict)
    """Why not pruned -> numbers in parameters of that kind, biases and normalizations left out."""
    tied: int = 0
    frozen: int = 0
    idle: list[str] = field(default_factory=list)
    """Pruned tensors that get no gradient: the output does not depend on them."""
    scope: str = "global"
    """What the weights were ranked over; "layer" where a global ranking would have emptied the head."""
    notes: list[str] = field(default_factory=list)
    """What the search told its user."""
    one_channel: str = ""
    """Why the model cannot be built for images of one channel; empty where it can."""
    seconds: float = 0.0
    memory: float = 0.0
    """The most that the process held, in bytes."""
    error: str | None = None
    """What failed; None for a pass."""
    members: int = 0
    """Of the family."""
    standardizing: list[str] = field(default_factory=list)
    """Members with `standardized` tensors."""
    little: dict[str, float] = field(default_factory=dict)
    """Members of whose parameters less than 90 % can be pruned -> that share."""


# ------------------------------------------------------------------------------------------ which member


def survey(family: str) -> list[Report]:
    """What can be pruned in each member of `family`, as large as it comes; without memory for weights."""
    reports = []
    for name in timm.list_models(module=family):
        with torch.device("meta"):
            model = timm.create_model(name)
        report = Report(family=family, member=name, args={})
        _describe(report, model)
        reports.append(report)
    return reports


def smallest_images(member: str, args: Mapping[str, Any]) -> int:
    """The smallest side of images, of `SIZES`, with which `member` can be built, trained and evaluated."""
    faults = []
    for size in SIZES:
        images = torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(0))
        try:
            model = models.source(member, args, example=images, outputs=CLASSES).new(0)
            loss = outputs.cross_entropy(model.train()(images), torch.arange(BATCH))
            torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            with torch.no_grad():
                scores = outputs.predictions(model.eval()(images))
            assert scores.shape == (BATCH, CLASSES), f"outputs of shape {tuple(scores.shape)}"
            assert bool(loss.isfinite()) and bool(scores.isfinite().all()), "outputs that are not finite"
            return size
        except Exception as error:
            faults.append(f"{size} px: {type(error).__name__}: {error}")
    raise AssertionError(f"takes images of none of the sizes; {faults[0]}; {faults[-1]}")


# -------------------------------------------------------------------------------------------- the check


def check(
    member: str, folder: Path, *, args: Mapping[str, Any] | None = None, size: int | None = None, family: str = ""
) -> Report:
    """A search of `member` in `folder`: two dense iterations, prune 20 % over all layers, rewind, two masked ones.

    Two iterations leave a head that starts near zero with the lowest magnitudes of all, so that a ranking over all
    layers prunes all of it, which ticketfind refuses; then each layer loses its own 20 %.

    Checked, all to the bit: the start is what the seed gives; the mask keeps the highest magnitudes, as many as it
    should; survivors and buffers start at the rewind point and pruned weights are 0.0, before and after the masked
    training; the ticket file and the dense export, put into other fresh models, give the outputs of the masked model,
    which differ from those of the unmasked one. Also: outputs and input channels follow the data. Nothing is raised:
    the first fault is the report's `error`. size: of the images; the smallest that work where None.
    """
    report = Report(family=family, member=member, args=dict(args or {}))
    began = time.monotonic()
    try:
        report.size = size or smallest_images(member, report.args)
        try:
            _search_and_export(report, folder / "global")
        except TicketfindError as error:
            if "allow_collapse" not in str(error):
                raise
            report.scope = "layer"  # as the message says
            _search_and_export(report, folder / "layer")
        report.one_channel = _one_channel(report)
    except Exception as error:
        where = "" if isinstance(error, (AssertionError, TicketfindError)) else f"{type(error).__name__}: "
        report.error = " ".join(f"{where}{error}".split())[:400]
    report.seconds = time.monotonic() - began
    report.memory = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return report


def _search_and_export(report: Report, folder: Path) -> None:
    assert report.size is not None
    data = _images(report.size)
    source = models.source(report.member, report.args, example=data.example()[0], outputs=data.outputs)
    initial = models.state_of(source.new(0))
    task = Task(
        model=source.new(0), data=data, device=torch.device("cpu"), fresh=lambda s: models.state_of(source.new(s))
    )
    _describe(report, task.model)
    assert report.prunable, "nothing to prune"

    recipe = _recipe(report)
    planned = plan.make_plan(recipe, task.model)
    folder.mkdir()
    run, watch, seen = RunDir(folder / "run"), _Watch(report.notes), _Trainings()
    rounds = search.search(recipe, replace(task, trainer=seen), run, planned, SCORES["magnitude"], watch)
    (_, before), (arm, after) = seen.done
    assert len(rounds) == 2 and before.kept is not None and after.kept is not None
    report.idle = [name for name in arm.masks if _same(before.final[name], initial[name])]

    _assert_same(before.kept, initial, "the rewind point is not the initialization of the seed")
    for names in [[name] for name in arm.masks] if report.scope == "layer" else [list(arm.masks)]:
        _assert_highest_are_kept({name: arm.masks[name] for name in names}, before.final)
    start = _masked(initial, arm.masks, prunable.aliases(task.model))
    _assert_same(after.kept, start, "the masked training does not start at the rewind point")
    for name, mask in arm.masks.items():
        assert bool((after.final[name][~mask] == 0.0).all()), f"{name}: a pruned weight is not 0.0 after training"
        assert bool(after.final[name].isfinite().all()), f"{name}: a weight is not finite after training"

    ticket = load_ticket(run.ticket_file)
    write_as(ticket, folder / "full.safetensors", "ticket", force=False)
    write_as(ticket, folder / "dense.safetensors", "dense", force=False)
    reference, applied, loaded = source.new(0), source.new(1), source.new(2)
    reference.load_state_dict(start, strict=False)
    load_ticket(folder / "full.safetensors").apply(applied)
    loaded.load_state_dict(load_file(folder / "dense.safetensors"))
    inputs = data.example(BATCH)[0]
    assert isinstance(inputs, Tensor)
    unmasked = _output(_awake(source.new(0)), inputs)
    assert not _same(unmasked, _output(_awake(source.new(0), start), inputs)), "pruning does not change the outputs"
    for name, model in (("the ticket file", applied), ("the dense export", loaded)):
        _assert_same(models.state_of(model), models.state_of(reference), f"{name} gives another model")
        assert _same(_output(model, inputs), _output(reference, inputs)), f"{name} gives other outputs"
    expected = _output(_awake(reference), inputs)
    for name, model in (("the ticket file", applied), ("the dense export", loaded)):
        assert _same(_output(_awake(model), inputs), expected), f"{name} gives other outputs behind layers of zeros"


def _images(size: int, channels: int = 3) -> Data:
    """Random images [n, channels, size, size], every class among the labels."""
    generator = torch.Generator().manual_seed(0)

    def split(n: int) -> Split:
        return Split(torch.randn(n, channels, size, size, generator=generator), torch.arange(n) % CLASSES)

    return Data(split(2 * BATCH), split(BATCH), split(BATCH))


def _recipe(report: Report) -> Recipe:
    layer = {
        "model": {"spec": report.member, "args": report.args},
        "data": {"spec": "tests/timm_sweep.py:images"},
        "train": {
            "iterations": ITERATIONS, "batch_size": BATCH, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01,
            "schedule": "constant", "warmup": 0, "eval_every": ITERATIONS,
        },
        "prune": {"fraction": FRACTION, "rounds": 1, "scope": report.scope, "rewind": "0it"},
        "run": {"replicates": 1, "seed": 0, "tolerance": 100},
    }  # fmt: skip
    return from_layers({"name": report.member}, layer).resolved(train_size=2 * BATCH, validation=BATCH, device="cpu")


class _Trainings:
    """A trainer that is ticketfind's own, and keeps what came of it and the weights that each arm started from."""

    def __init__(self) -> None:
        self.done: list[tuple[Arm, Outcome]] = []

    def __call__(self, task: Task, arm: Arm, work: Work) -> Outcome:
        ((_, outcome),) = fit(
            [arm], replace(task, trainer=None), work.how, way=EAGER, keep_at=arm.first, tick=work.tick
        )
        self.done.append((arm, outcome))
        return outcome


@dataclass(frozen=True)
class _Watch:
    notes: list[str]

    def begin(self, total: int, done: int) -> None: ...

    def tick(self, iterations: int) -> None: ...

    def skip(self, iterations: int) -> None: ...

    def round(self, finished: Round) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)


def _describe(report: Report, model: nn.Module) -> None:
    """Count what is pruned, by kind, and what is not."""
    kinds: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    report.parameters = report.prunable = report.standardized = report.frozen = 0
    for candidate in prunable.candidates(model):
        weights = math.prod(candidate.shape)
        report.parameters += weights
        if candidate.pruned:
            report.prunable += weights
            report.standardized += "standardized" in candidate.reason
            kinds[_kind(model, candidate)] += 1
        elif candidate.reason not in ("bias", "normalization"):
            whole[candidate.reason.removesuffix(" is not a Linear, Conv or attention weight")] += weights
        report.frozen += candidate.reason == "frozen"
    report.kinds, report.whole, report.tied = dict(kinds.most_common()), dict(whole), len(prunable.aliases(model))


def _kind(model: nn.Module, candidate: prunable.Candidate) -> str:
    layer = model.get_submodule(candidate.name.rpartition(".")[0].partition(".parametrizations")[0])
    groups = getattr(layer, "groups", 1)
    if groups > 1:
        return "depthwise" if groups == layer.in_channels else "grouped"
    if isinstance(layer, nn.Linear):
        return "linear"
    return "conv" if "Conv" in candidate.reason else candidate.reason


def _masked(state: Mapping[str, Tensor], kept: Masks, tied: Mapping[str, str]) -> State:
    """`state` with pruned weights 0.0, tied ones under all their names; by other means than ticketfind's."""
    every = kept | {alias: kept[name] for alias, name in tied.items() if name in kept}
    return {
        name: value.clone().masked_fill_(~every[name], 0.0) if name in every else value for name, value in state.items()
    }


def _assert_highest_are_kept(kept: Masks, trained: State) -> None:
    """Of the weights that are ranked together, those of the highest magnitudes, as many as there should be."""
    count, size = (sum(int(f(mask)) for mask in kept.values()) for f in (torch.sum, torch.numel))
    assert count == size - round(FRACTION * size), f"{count} of {size} weights kept"
    lowest = min((float(trained[name].abs()[mask].min()) for name, mask in kept.items() if mask.any()), default=0.0)
    highest = max(
        (float(trained[name].abs()[~mask].max()) for name, mask in kept.items() if not mask.all()), default=0.0
    )
    assert count == 0 or lowest >= highest, f"a weight of magnitude {highest} is pruned, one of {lowest} is kept"


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _assert_same(found: State, expected: State, message: str) -> None:
    assert found.keys() == expected.keys(), f"{message}: {sorted(found.keys() ^ expected.keys())[:3]}"
    differing = [name for name in expected if not _same(found[name], expected[name])]
    assert not differing, f"{message}: {', '.join(differing[:3])}"


@torch.no_grad()
def _awake(model: nn.Module, start: State | None = None) -> nn.Module:
    """`model`, with `start` in it; random numbers where a parameter is zero throughout.

    Heads and gains that start at zero would hide everything before them.
    """
    generator = torch.Generator().manual_seed(0)
    asleep = [parameter for parameter in model.parameters() if not parameter.any()]
    if start is not None:
        model.load_state_dict(start, strict=False)
    for parameter in asleep:
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def _output(model: nn.Module, inputs: Tensor) -> Tensor:
    found = outputs.predictions(model.eval()(inputs))
    assert bool(found.isfinite().all()), "outputs that are not finite"
    return found


def _one_channel(report: Report) -> str:
    """Why `member` does not follow data of one channel and another number of classes; empty where it does."""
    assert report.size is not None
    images = torch.randn(2, 1, report.size, report.size)
    try:
        scores = _output(models.source(report.member, report.args, example=images, outputs=5).new(0), images)
    except Exception as error:
        return " ".join(str(error).split())[:200]
    return "" if scores.shape == (2, 5) else f"outputs of shape {tuple(scores.shape)} for 5 classes"


# ------------------------------------------------------------------------------------- family by family


def check_family(family: str) -> Report:
    """`check` of the smallest member, and what there is to say of all of them."""
    every = survey(family)
    report = check_member(family, min(every, key=lambda one: one.parameters).member)
    report.members = len(every)
    report.standardizing = [one.member for one in every if one.standardized]
    report.little = {one.member: share for one in every if (share := one.prunable / one.parameters) < 0.9}
    return report


def check_member(family: str, member: str) -> Report:
    """`check` in a temporary folder, which is the working directory meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # runs/latest is made here
        try:
            return check(member, Path(folder), args=SHRUNK.get(member), family=family)
        finally:
            os.chdir("/")


Item = tuple[str, str]
"""A family, and the member to take; the smallest where that is empty."""


def sweep(items: Sequence[Item], *, jobs: int, limit: float) -> Iterator[Report]:
    """A report of each item, as they are finished; `jobs` at a time, each in a process of its own."""
    context = multiprocessing.get_context("fork")  # torch and timm are imported already
    waiting = list(items)
    running: dict[Connection, tuple[Item, multiprocessing.context.ForkProcess, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(sending, waiting[0], max(1, forks.cores() // jobs)))
            process.start()
            sending.close()
            running[receiving] = (waiting.pop(0), process, time.monotonic())
        ready = wait(list(running), timeout=1.0)
        for connection, (item, process, began) in list(running.items()):
            seconds = time.monotonic() - began
            if connection in ready:
                yield _received(connection, item, process)
            elif seconds > limit:
                yield _failed(item, f"not done in {limit:.0f} s")
            else:
                continue
            process.kill()
            process.join()
            connection.close()
            del running[connection]


def _received(connection: Connection, item: Item, process: multiprocessing.context.ForkProcess) -> Report:
    try:
        return Report(**connection.recv())
    except EOFError:
        process.join()
        return _failed(item, f"the process ended with code {process.exitcode}")


def _failed(item: Item, error: str) -> Report:
    return Report(family=item[0], member=item[1] or "?", args={}, error=error)


def _child(sending: Connection, item: Item, threads: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    family, member = item
    try:
        found = check_member(family, member) if member else check_family(family)
    except Exception as error:
        found = _failed(item, f"{type(error).__name__}: {error}")
    sending.send(asdict(found))


# ------------------------------------------------------------------------------------------- what is shown


def _cells(report: Report) -> list[str]:
    args = "".join(f", {key}={value}" for key, value in report.args.items())
    share = f"{report.prunable / report.parameters:.1%}" if report.parameters else ""
    return [
        report.family,
        report.member + args + (f" ({FURTHER[report.member]})" if report.member in FURTHER else ""),
        f"{report.parameters:,}",
        share,
        ", ".join(f"{count} {kind}" for kind, count in report.kinds.items()),
        "" if report.size is None else str(report.size),
        "failed" if report.error else "passed, but not 1 channel" if report.one_channel else "passed",
    ]


_HEADINGS = ["family", "member", "parameters", "prunable", "tensors pruned", "pixels", "result"]


def totals(reports: Sequence[Report]) -> str:
    """The counts, and a line for each failure."""
    further = [report for report in reports if report.member in FURTHER]
    families = [report for report in reports if report.member not in FURTHER]
    lines = []
    for what, some in (("families", families), ("further members", further)):
        failed = sum(report.error is not None for report in some)
        lines += [f"{len(some)} {what} tried, {len(some) - failed} passed, {failed} failed"] if some else []
    return "\n".join(["; ".join(lines), *(f"- {r.family} ({r.member}): {r.error}" for r in reports if r.error)])


def markdown(reports: Sequence[Report]) -> str:
    """The table of docs/models.md and what goes with it."""
    versions = (
        f"timm {timm.__version__}, torch {torch.__version__.partition('+')[0]}, Python {platform.python_version()}"
    )

    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def members(wanted: Callable[[Report], bool]) -> str:
        return ", ".join(report.member for report in reports if wanted(report)) or "none"

    def some(members: Sequence[str], report: Report) -> str:
        return f"{report.family} (all {report.members})" if len(members) == report.members else ", ".join(members)

    standardizing = [some(report.standardizing, report) for report in reports if report.standardizing]
    little = [f"{member} ({share:.0%})" for report in reports for member, share in report.little.items()]
    return "\n".join(
        [
            f"{versions}: {totals(reports)}",
            "",
            "Of the members that were run:",
            "",
            f"- not for images of one channel: {members(lambda r: bool(r.one_channel))}",
            f"- tied parameters: {members(lambda r: bool(r.tied))}",
            f"- frozen parameters: {members(lambda r: bool(r.frozen))}",
            f"- weights that can be pruned but on which no output depends: {members(lambda r: bool(r.idle))}",
            f"- a layer left without a weight by the ranking over all layers:"
            f" {members(lambda r: bool(r.notes) and r.scope == 'global')}",
            f"- and no path left from input to output, so that layers were ranked one by one:"
            f" {members(lambda r: r.scope == 'layer')}",
            "",
            f"Of all {sum(report.members for report in reports)} members of these families, counted and not run:",
            "",
            f"- convolutions that standardize their weight: {'; '.join(standardizing) or 'none'}",
            f"- less than 90 % of the parameters can be pruned: {', '.join(little) or 'none'}",
            "",
            row(_HEADINGS),
            row(["---", "---", "---:", "---:", "---", "---:", "---"]),
            *(row(_cells(report)) for report in reports),
        ]
    )


BEGIN, END = "<!-- begin: python tests/timm_sweep.py --markdown -->\n", "<!-- end -->"


def put_into(page: Path, text: str) -> None:
    """Replace what stands between the two comments in `page`."""
    head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise SystemExit(f"{page}: expected {BEGIN.strip()} and {END}")
    page.write_text(f"{head}{BEGIN}\n{text}\n\n{END}{tail}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=timm.list_modules(), metavar="NAME", help="these only")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")
    parser.add_argument("--limit", type=float, default=600, help="seconds for a family")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports there")
    parser.add_argument(
        "--read", type=Path, metavar="FILE", help="reports of an earlier --json; run what is not there, or named"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the table into this page")
    options = parser.parse_args()
    earlier = json.loads(options.read.read_text()) if options.read else []
    wanted = options.family or timm.list_modules()
    items = [(family, "") for family in wanted]
    items += [(family, member) for family in wanted for member in timm.list_models(module=family) if member in FURTHER]
    fresh = set(options.family or ())
    reports = [Report(**report) for report in earlier if report["family"] not in fresh]
    known = {(report.family, report.member if report.member in FURTHER else "") for report in reports}
    todo = [item for item in items if item not in known]
    for report in sweep(todo, jobs=options.jobs, limit=options.limit):
        reports.append(report)
        print(" | ".join([*_cells(report), f"{report.seconds:.0f} s", report.error or ""]), flush=True)
        if options.json:
            options.json.write_text(json.dumps([asdict(report) for report in reports], indent=1))
    reports.sort(key=lambda report: (report.family, report.member in FURTHER))
    print(totals(reports))
    print("stacked: not yet, the engine has no stacked way")
    if options.markdown:
        put_into(options.markdown, markdown(reports))
    return int(any(report.error for report in reports))


if __name__ == "__main__":
    sys.exit(main())
