"""Draw a finished run and its newest evaluation as the terminal shows them: python docs/make_picture.py RUN OUT.svg"""

import io
import json
import re
import sys
from pathlib import Path

from rich.console import Console

from ticketfind import answers, results, terminal, views
from ticketfind.experiments import Evaluation
from ticketfind.rundir import RunDir
from ticketfind.verdict import Comparison, Verdict


def main(run: RunDir, out: Path) -> None:
    """Replay what `search` and `eval` printed for `run`, from what they wrote."""
    recipe = run.recipe()
    rounds = results.rounds_of(run.log(), replicates=recipe.run.replicates, given_tolerance=recipe.run.tolerance)
    screen = terminal.Screen()
    screen.console = Console(record=True, width=84, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    screen.message("$ ticketfind search")
    screen.message(
        f"{run.path}: searches {recipe.model.spec} on {recipe.data.spec}, {recipe.run.replicates} replicates"
    )
    views.show_rounds(screen, rounds)
    views.show_search(screen, run, rounds, 0.0)
    described = json.loads(max((run.path / "evals").glob("*.json")).read_text())
    levels = [f"--noise {name.removeprefix('noise=')}" for name in described["arms"] if name.startswith("noise=")]
    screen.message("")
    screen.message(" ".join(["$ ticketfind eval", *levels]))
    arms = {
        name: results.Stats(
            *(results.Spread.of(stats[key]["values"]) for key in ("accuracy_early", "accuracy_end", "early_stop"))
        )
        for name, stats in described["arms"].items()
    }
    found = Evaluation(
        remaining=described["remaining"],
        against=described["against"],
        arms=arms,
        trials=described["trials"],
        verdict=Verdict(
            described["verdict"], described["margin"], tuple(Comparison(**each) for each in described["comparisons"])
        ),
        notes=tuple(described["notes"]),
    )
    answers.show_evaluation(screen, found, described)
    picture = screen.console.export_svg(title="ticketfind")
    out.write_text(re.sub(r"@font-face\s*{[^}]*}", "", picture), encoding="utf-8")  # no fonts from elsewhere


if __name__ == "__main__":
    main(RunDir(Path(sys.argv[1])), Path(sys.argv[2]))
