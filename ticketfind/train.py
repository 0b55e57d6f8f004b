"""Training arms and measuring them: schedule of evaluations, early stop, metrics. Knows no rounds and no disk."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import nn

from ticketfind import TicketfindError, devices, engine, invariants, masks, memory
from ticketfind.arms import Arm, Look, Note, Outcome, Snapshots, State, Task, Watched, Work, measured
from ticketfind.batches import Order, derived_seed, seeded
from ticketfind.course import Course, Drawn, Failed, Point, Snapshot, course_of, snapshot, take_up
from ticketfind.devices import EAGER, Way
from ticketfind.digests import digest
from ticketfind.engine import Lockstep
from ticketfind.forks import Tick
from ticketfind.masks import Masks
from ticketfind.prunable import aliases
from ticketfind.recipe import Train
from ticketfind.specs import one_line


def fit(
    arms: Sequence[Arm],
    task: Task,
    how: Train,
    *,
    way: Way = EAGER,
    keep_at: int | None = None,
    until: int | None = None,
    tick: Tick = lambda n: None,
    skip: Tick = lambda n: None,
    note: Note = lambda text: None,
    folder: Path | None = None,
    snapshots: Snapshots | None = None,
    paths: bool = False,
    watched: Watched | None = None,
) -> Generator[tuple[Arm, Outcome | Failed], None, None]:
    """Train every arm to ``how.iterations``; each with its outcome, in order, as it is finished.

    way: how the arms share the device; the numbers do not depend on it beyond rounding. keep_at: iteration whose
    weights are kept in the outcome. until: iteration to end after; what is trained is the beginning of the whole. tick:
    told of the iterations done; may raise, to end it all. skip: told of those that a failed training leaves undone.
    note: told what the user should know. folder: for the files of an outside program that trains. snapshots: trainings
    go on from them, and are kept in them, at the latest when `tick` raises. paths: outcomes tell how far each weight
    has gone. watched: for the masks that are drawn; such trainings are measured at their end only, if at all, and are
    not kept in snapshots.
    Raises TicketfindError, naming the arm, where the training fails; numbers that are no longer finite end one arm.
    """
    together = [*_together(arms, way.in_step)]

    def train(index: int, tick: Tick) -> list[Outcome | Failed]:
        work = Work(how, keep_at, tick, folder, None if watched else snapshots, until, paths, watched)
        with _faults_of(together[index], task, how, min(way.at_once, len(arms))):
            if task.trainer is not None:
                return [task.trainer(task, arm, work) for arm in together[index]]
            return _train(task, together[index], work, way, note)

    outcomes = itertools.chain.from_iterable(engine.each(way, len(together), train, tick))
    for arm, outcome in zip(arms, outcomes, strict=True):
        if isinstance(outcome, Failed):
            skip(outcome.left)
        yield arm, outcome


def check_memory(task: Task, how: Train, way: Way, arms: int) -> None:
    """Raise TicketfindError where `arms` trainings, as many at once as the way says, cannot fit into what is free."""
    if task.need is not None:
        memory.check(task.need, min(way.at_once, arms), how.batch_size, task.device)


def _together(arms: Sequence[Arm], most: int) -> Iterator[list[Arm]]:
    """The arms in their order, in groups that begin at the same iteration."""
    for _, same in itertools.groupby(arms, key=lambda arm: arm.first):
        while group := list(itertools.islice(same, most)):
            yield group


@contextmanager
def _faults_of(arms: Sequence[Arm], task: Task, how: Train, at_once: int = 1) -> Iterator[None]:
    """Whatever goes wrong inside is told in one line that says in which training. at_once: arms in memory together."""
    names = arms[0].name if len(arms) == 1 else f"{arms[0].name} to {arms[-1].name}"
    try:
        yield
    except TicketfindError:
        raise
    except Exception as error:
        if task.trainer is not None or not memory.has_run_out(error):
            raise TicketfindError(f"{names}: training failed: {one_line(error)}") from error
        advice = memory.what_fits(task.need, at_once, how.batch_size, memory.free(task.device))
        raise TicketfindError(
            f"{names}: memory ran out on {task.device} with a batch of {how.batch_size}; {advice}"
        ) from error


def judge(
    arms: Iterable[tuple[Arm, State]], task: Task, how: Train, *, precision: str
) -> Generator[tuple[Arm, Outcome | Failed], None, None]:
    """Every arm with the outcome that given weights, in place of its training, stand for; measured, not trained,
    in the precision that trainings beside them are measured in."""
    way = Way(precision=precision)
    for arm, weights in arms:
        with _faults_of([arm], task, how), devices.arithmetic(way, task.device, task.model):
            training = engine.begin(way, task.model, [(weights, arm.masks)], list, how, task.loss, device=task.device)
            began = _digests(training, task.model, [(arm.name, weights, arm.masks)])
            course = Course.new(int(how.iterations), began)
            course.kept = [arm.start]
            _measure(training, task, how, course, lambda: None)
            (outcome,) = _outcomes(training, task, course, how, end=course.at)
        yield arm, outcome


PAUSE = 0.2
"""Seconds of training, about, from one moment at which it can be kept or ended to the next."""


def _train(task: Task, arms: Sequence[Arm], work: Work, way: Way, note: Note) -> list[Outcome | Failed]:
    """Train arms that begin at the same iteration."""
    how, keep_at, first, watched = work.how, work.keep_at, arms[0].first, work.watched
    last, every = int(how.iterations) if work.until is None else work.until, int(how.eval_every)
    planned = last
    looked_at = set[int]()
    if watched is not None and watched.every is not None:
        looked_at = {*range(first + watched.every, last + 1, watched.every)}
    stops = [*range(every, last, every), last] if watched is None else [last] if watched.at_end else []
    measured_at = {stop for stop in stops if stop > first}
    kept_at = {keep_at} if keep_at is not None and keep_at >= first else set()
    with _own_draws(task), devices.arithmetic(way, task.device, task.model):
        training, course = _begun(task, arms, work, way, note)

        def take() -> Snapshot:
            return snapshot(course, training, task.device)

        def pause(iterations: int = 0) -> None:
            try:
                work.tick(iterations)
            except BaseException:
                if work.snapshots is not None:
                    work.snapshots.offer(arms, take, now=True)
                raise
            if work.snapshots is not None:
                work.snapshots.offer(arms, take)

        count, tightened = 1, list[Masks]()
        for stop in sorted(measured_at | kept_at | looked_at | {last}):
            while course.at < stop and not course.is_over:
                count = min(count, stop - course.at)
                began = time.monotonic()
                _note_losses(course, training.advance(count), how)
                seconds = max(time.monotonic() - began, 1e-6)
                pause(count * len(arms))
                count = max(1, min(4 * count, int(count * PAUSE / seconds)))
            if stop in kept_at and not course.kept:
                course.kept = training.states()
            if watched is not None and stop in looked_at and not course.is_over:
                looks = _looks(training, stop, paths=work.paths)
                _note_weights(course, [look.state for look in looks], task, how)
                each = [*zip(arms, looks, course.failed, strict=True)]
                if watched.tighter is not None and not course.is_over:
                    before = tightened or [arm.masks for arm in arms]
                    tightened = [
                        old if failed else watched.tighter(arm, look)
                        for old, (arm, look, failed) in zip(before, each, strict=True)
                    ]
                    training.tighten(tightened)
                if watched.enough is not None and not course.is_over:
                    enough = [watched.enough(arm, look) for arm, look, failed in each if not failed]  # all are asked
                    if all(enough):
                        last = stop
                        measured_at.add(stop)
            if stop in measured_at and not course.is_over and not course.is_measured(stop):
                course.drawn = Drawn.so_far(task.device)
                _measure(training, task, how, course, pause)
                course.drawn = None
            if stop == last:
                break
        if work.snapshots is not None:
            work.snapshots.settle()
        return _outcomes(training, task, course, how, end=planned, paths=work.paths, tightened=tightened)


def _looks(training: Lockstep, at: int, *, paths: bool) -> list[Look]:
    """Of each arm."""
    states = training.states()
    gone: Sequence[State | None] = training.paths() if paths else [None] * len(states)
    return [Look(at, state, path) for state, path in zip(states, gone, strict=True)]


def _begun(task: Task, arms: Sequence[Arm], work: Work, way: Way, note: Note) -> tuple[Lockstep, Course]:
    """Where a snapshot of the arms has left off, or from their start."""

    def begin(at: int) -> Lockstep:
        data, how, total = task.data, work.how, int(work.how.iterations)
        assert data is not None
        ahead = min(at, total - 1)  # at the end too there is a batch to rehearse with
        return engine.begin(
            way,
            task.model,
            [(arm.start, arm.masks) for arm in arms],
            lambda: [data.training(Order(arm.seed, how.batch_size, ahead, total)) for arm in arms],
            how,
            task.loss,
            device=task.device,
            seed=derived_seed(arms[0].seed, "draws"),
            first=at,
            note=note,
            extra=work.extra,
        )

    def digests(training: Lockstep) -> list[str]:
        return _digests(training, task.model, [(arm.name, arm.start, arm.masks) for arm in arms])

    try:
        found = None if work.snapshots is None else work.snapshots.find(arms)
        if found is not None:
            course = course_of(found, len(arms), arms[0].first, int(work.how.iterations))
            training = begin(course.at)
            if digests(training) != course.began:
                raise ValueError("it is of a training that began elsewhere")
            take_up(found, training, task.device)
            each = zip(arms, training.states(), course.failed, strict=True)
            if any(masks.nonzero_outside(arm.masks, state) for arm, state, failed in each if not failed):
                raise ValueError("its pruned weights are not zero")
            return training, course
    except Exception as error:  # whatever is wrong with it
        note(f"{arms[0].name}: its snapshot cannot be used and is trained from its start: {one_line(error)}")
    training = begin(arms[0].first)
    return training, Course.new(arms[0].first, digests(training))


def _digests(training: Lockstep, model: nn.Module, arms: Sequence[tuple[str, State, Masks]]) -> list[str]:
    """Of what each arm begins with, tied parameters once. Raises Violated where that is not as it was given."""
    found, tied = [], aliases(model)
    for (name, start, mask), state in zip(arms, training.states(), strict=True):
        begins = {key: value for key, value in state.items() if key not in tied}
        if faults := invariants.of_start(begins, start, mask):
            raise invariants.Violated.of(name, faults)
        found.append(digest(begins))
    return found


def _own_draws(task: Task) -> AbstractContextManager[None]:
    """What is drawn at random inside changes nothing outside."""
    return seeded(0, task.device)


def _note_losses(course: Course, losses: Sequence[Sequence[float]], how: Train) -> None:
    """Count the iterations; an arm's first loss that is not finite ends it."""
    for arm, new in enumerate(losses):
        course.losses[arm] += new
        bad = next((course.at + number for number, loss in enumerate(new) if not math.isfinite(loss)), None)
        if bad is not None:
            _fail(course, arm, bad, "the loss", how)
    course.at += len(losses[0])


def _note_weights(course: Course, states: Sequence[State], task: Task, how: Train) -> None:
    """Weights that are not finite end an arm."""
    trained = {name for name, _ in task.model.named_parameters()}
    for arm, state in enumerate(states):
        bad = next((name for name in trained & state.keys() if not bool(torch.isfinite(state[name]).all())), None)
        if bad is not None:
            _fail(course, arm, course.at, bad, how)


def _fail(course: Course, arm: int, iteration: int, what: str, how: Train) -> None:
    course.failed[arm] = course.failed[arm] or Failed(
        iteration,
        f"{what} is not finite at iteration {iteration}; try a lower learning rate (now {how.lr:g}), or look at the"
        " data (values that are no good, a batch in which no label counts)",
    )


def _measure(training: Lockstep, task: Task, how: Train, course: Course, between: Callable[[], None]) -> None:
    """Evaluate each arm where it is."""
    assert task.data is not None
    validation = training.measure(task.data.validation, (task.loss, task.metric), how.batch_size, between)
    test = training.measure(task.data.test, (task.metric,), how.batch_size, between)
    rows: list[list[float]] = torch.cat([validation, test], dim=1).tolist()
    for arm, row in enumerate(rows):
        if not all(map(math.isfinite, row)):
            _fail(course, arm, course.at, "the loss or metric of an evaluation", how)
        losses = course.losses[arm]
        course.points[arm].append(Point(course.at, sum(losses) / len(losses) if losses else None, *row))
        course.losses[arm] = []


def _outcomes(
    training: Lockstep,
    task: Task,
    course: Course,
    how: Train,
    *,
    end: int,
    paths: bool = False,
    tightened: Sequence[Masks] = (),
) -> list[Outcome | Failed]:
    """What has come of each arm; `end` is where it was to end."""
    found: list[Outcome | Failed] = []
    gone = training.paths() if paths else []
    finals = training.states()
    _note_weights(course, finals, task, how)
    for arm, final in enumerate(finals):
        kept, points = course.kept[arm] if course.kept else None, course.points[arm]
        failed = course.failed[arm]
        found.append(
            dataclasses.replace(failed, left=end - course.at)
            if failed
            else Outcome(
                course.began[arm],
                tuple(points),
                final,
                kept,
                measured(points) if points else None,
                _test_size(task),
                gone[arm] if paths else None,
                {name: mask.cpu() for name, mask in tightened[arm].items()} if tightened else None,
            )
        )
    return found


def step_seconds(task: Task, how: Train, steps: int = 5) -> list[float]:
    """The time that each of the first `steps` iterations of a dense training takes, its batch's reading included."""
    assert task.data is not None
    data, start, seconds = task.data, Arm("the first steps", task.start(0), {}, 0), []
    with _faults_of([start], task, how), _own_draws(task):
        training = engine.begin(
            EAGER,
            task.model,
            [(start.start, {})],
            lambda: [data.training(Order(0, how.batch_size, 0, steps))],
            how,
            task.loss,
            device=task.device,
        )
        for _ in range(steps):
            began = time.perf_counter()
            training.advance(1)
            seconds.append(time.perf_counter() - began)
    return seconds


def _test_size(task: Task) -> int | None:
    return None if task.data is None else len(task.data.test)
