"""Which figures the report shows: a table of titles, metrics and notes, and the few that compute.

A figure of one run may hold several metrics. Of several runs there is a figure for each metric, and a
colour for each run. A figure with nothing to draw is '', and vanishes from the page.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from exgrpo_fast.core.text import clean_text
from exgrpo_fast.run.display.formatting import finite, number_of
from exgrpo_fast.run.metrics import PHASES
from exgrpo_fast.run.report.reading import Run, interval
from exgrpo_fast.run.report.svg import Line, Mark, heat_figure, line_figure, stacked_figure

NUM_REASONS = NUM_PHASES = 6  # drawn on their own; the seventh colour is that of the rest
SMALLEST_PHASE = 0.01  # share of the run's time; phases below it are drawn as 'other'


class Section(NamedTuple):
    title: str
    figures: Sequence[Curves | Computed]
    only_with: str = ""  # a metric: runs that do not write it have no such section

    def draw(self, run: Run) -> list[str]:
        if self.only_with and not run.series(self.only_with):
            return []
        return [figure.draw(run) for figure in self.figures]

    def compare(self, runs: Sequence[Run]) -> list[str]:
        if self.only_with and not any(run.series(self.only_with) for run in runs):
            return []
        return [drawn for figure in self.figures for drawn in figure.compare(runs)]


@dataclass(frozen=True)
class Curves:
    """A figure of metrics as they are logged: legend -> metric."""

    title: str
    metrics: Mapping[str, str]
    note: str = ""
    smooth: bool = True
    zero: bool = True

    def draw(self, run: Run) -> str:
        series = [(legend, run.series(metric)) for legend, metric in self.metrics.items()]
        lines = [Line(*each, colour, self.smooth) for colour, each in enumerate(series, start=1)]
        return line_figure(self.title, lines, zero=self.zero, note=self.note)

    def compare(self, runs: Sequence[Run]) -> list[str]:
        return [
            line_figure(
                self.title if len(self.metrics) == 1 else f"{self.title}: {legend}",
                [
                    Line(run.name, run.series(metric), colour, self.smooth)
                    for colour, run in enumerate(runs, start=1)
                ],
                zero=self.zero,
                note=self.note,
            )
            for legend, metric in self.metrics.items()
        ]


@dataclass(frozen=True)
class Computed:
    """A figure of one run that a function draws; runs are compared by `compared`."""

    draw: Callable[[Run], str]
    compared: Sequence[Curves] = ()

    def compare(self, runs: Sequence[Run]) -> list[str]:
        return [drawn for curves in self.compared for drawn in curves.compare(runs)]


# --- figures that compute -------------------------------------------------------------------------


def rewards(run: Run) -> str:
    """With the held-out evaluations."""
    lines = [
        Line("reward", run.series("reward_mean"), 1),
        Line("pass@1, all", run.series("pass_at_1"), 3),
        Line("pass@1, fresh", run.series("pass_at_1_fresh"), 4),
    ]
    marks = evaluations(run)
    return line_figure("Reward and pass@1", lines, marks=marks, mark_name="held-out avg@n")


def evaluations(run: Run, colour: int = 2) -> list[Mark]:
    """The held-out evaluations before, during (from the metrics) and after."""
    marks = {s: Mark(s, value, colour=colour) for s, value in run.series("eval_avg_at_n")}
    for key, step in (("eval_before", 0), ("eval_after", run.last_step)):
        if found := run.evaluation(key):
            marks[step] = Mark(step, float(found["avg_at_n"]), interval(found), colour)
    return [marks[step] for step in sorted(marks)]


def outcomes(run: Run) -> str:
    """Groups by outcome, or the learnable share alone where the rest is not known."""
    keys = ("learnable_frac", "all_fail_frac", "all_pass_frac")
    learnable, fail, passed = (run.series(key) for key in keys)
    note = "Only groups whose rewards differ carry a gradient."
    if fail and passed:
        # With partial rewards a group without a correct trajectory may be learnable: counted once.
        taken = {step: share + dict(passed).get(step, 0.0) for step, share in learnable}
        fail = [(step, min(share, max(0.0, 1.0 - taken.get(step, 0.0)))) for step, share in fail]
        layers = [
            ("none correct", fail, 5),
            ("learnable", learnable, 3),
            ("all correct", passed, 1),
        ]
        return stacked_figure("Groups by outcome", layers, note=note, top=1.0)
    line = Line("learnable share", learnable, 3)
    return line_figure("Learnable share of the groups", [line], note=note, top=1.0)


def reasons(run: Run) -> str:
    """The most frequent reasons of the rewards, as shares of the scored trajectories."""
    counted = [(step["step"], _reason_counts(step)) for step in run.steps]
    totals: Counter[str] = Counter()
    for _, counts in counted:
        totals.update(counts)
    layers = []
    for colour, (reason, _) in enumerate(totals.most_common(NUM_REASONS), 1):
        points = [(s, c.get(reason, 0) / total) for s, c in counted if (total := sum(c.values()))]
        layers.append((clean_text(reason, max_line=40), points, colour))
    return stacked_figure("Reasons of the rewards", layers, top=1.0)


def _reason_counts(step: Mapping[str, Any]) -> dict[str, Any]:
    found = step.get("reasons")
    if not isinstance(found, dict):
        return {}
    return {str(name): count for name in found if (count := number_of(found, name))}


def stored_questions(run: Run) -> str:
    started = [step for step, active in run.series("replay_active") if active]
    note = f"Replay is active from step {started[0]}." if started else ""
    return replace(STORED_QUESTIONS, note=note).draw(run)


def buckets(run: Run) -> str:
    replay = run.config.get("replay")
    continuous = isinstance(replay, dict) and replay.get("difficulty") == "reward_std"
    how = "how much the rewards of their group differed"
    first = 0  # 0 to K are logged
    if not continuous:  # questions with none or all correct have no bucket: 1 to K - 1
        how, first = "how many of their group's trajectories were correct", 1
    return _counts(
        run,
        "Replay buckets",
        "replay_buckets",
        lambda row, count: f"{first + row}/{2 * first + count - 1}",
        of="questions",
        note=f"Questions by {how}.",
    )


def ages(run: Run) -> str:
    return _counts(
        run,
        "Ages of stored trajectories",
        "replay_ages",
        lambda row, count: f"{2 ** (row - 1)}+" if row else "0",
        of="trajectories",
        note="Steps since generation, by powers of two: 4+ is 4 to 7, and only the last is open.",
    )


def _counts(
    run: Run, title: str, metric: str, label: Callable[[int, int], str], **options: str
) -> str:
    """A metric that is a list of counts. `label(row, count)`: of one of them, from 0."""
    logged = [(s["step"], s[metric]) for s in run.steps if isinstance(s.get(metric), list)]
    count = max((len(counts) for _, counts in logged), default=0)
    columns = [
        (step, [finite(value) or 0.0 for value in counts] + [0.0] * (count - len(counts)))
        for step, counts in logged
    ]
    return heat_figure(title, columns, [label(row, count) for row in range(count)], **options)


def phases(run: Run) -> str:
    smallest = SMALLEST_PHASE * run.total("step_seconds")
    timed = [name for name in PHASES if run.total(f"seconds_{name}") > smallest][:NUM_PHASES]
    layers = [(name, run.series(f"seconds_{name}"), i) for i, name in enumerate(timed, start=1)]
    known: dict[int, float] = defaultdict(float)
    for _, points, _ in layers:
        for step, seconds in points:
            known[step] += seconds
    rest = [(step, max(s - known[step], 0.0)) for step, s in run.series("step_seconds")]
    return stacked_figure("Seconds per step, by phase", [*layers, ("other", rest, 7)])


# --- the table ------------------------------------------------------------------------------------

STORED_QUESTIONS = Curves(
    "Questions in the replay buffer",
    {"questions to replay": "replay_size", "retired, solved for good": "retired_size"},
    smooth=False,
)
LEARNING = [
    Computed(
        rewards,
        [
            Curves("Mean reward", {"reward": "reward_mean"}),
            Curves("pass@1", {"all trajectories": "pass_at_1", "fresh": "pass_at_1_fresh"}),
        ],
    ),
    Computed(
        outcomes,
        [
            Curves(
                "Share of the groups",
                {
                    "learnable": "learnable_frac",
                    "none correct": "all_fail_frac",
                    "all correct": "all_pass_frac",
                },
            )
        ],
    ),
    Curves(
        "Entropy",
        {"fresh": "entropy", "replayed": "entropy_replay"},
        "Mean over tokens, in nats. A fall towards 0 means the policy stops exploring.",
    ),
    Curves(
        "Completion length", {"fresh": "completion_len_mean", "replayed": "completion_len_replay"}
    ),
    Curves(
        "Truncated share",
        {"cut at the length limit": "truncated_frac"},
        "A cut completion rarely holds an answer.",
    ),
    Computed(reasons),
]
REPLAY = [
    Computed(stored_questions, [STORED_QUESTIONS]),
    Computed(buckets),
    Computed(ages),
    Curves("Groups with a replayed trajectory", {"share": "replay_frac"}),
    Curves("Age of replayed trajectories, in steps", {"mean": "replay_age_mean"}),
    Curves(
        "Importance ratio of replayed tokens",
        {
            "mean": "replay_ratio_mean",
            "99th percentile": "replay_ratio_p99",
            "mean after shaping": "shaped_mean",
        },
    ),
]
PRIOR = [
    Curves(
        "Tokens redrawn by the prior",
        {
            "mean share": "prior_redrawn_frac",
            "90th percentile": "prior_redrawn_p90",
            "10th percentile": "prior_redrawn_p10",
        },
        "It rises where the policy has become surer of a token than the prior.",
    ),
    Curves(
        "Guided and fresh completions",
        {"pass@1, fresh": "pass_at_1_fresh", "pass@1, guided": "prior_pass_at_1"},
    ),
    Curves("Groups mixed only by a guided one", {"groups": "prior_groups_mixed"}),
    Curves(
        "Importance ratio of guided tokens",
        {"kept": "prior_ratio_kept_mean", "redrawn": "prior_ratio_redrawn_mean"},
    ),
    Curves("KL of policy to prior, in nats", {"fresh tokens": "prior_kl"}),
    Curves(
        "Drafts", {"tokens per round": "prior_tokens_per_round", "drafted per token": "prior_waste"}
    ),
]
HINDSIGHT = [
    Curves(
        "Revisions of a step",
        {
            "written": "hindsight_revisions",
            "joined their group": "hindsight_joined",
            "better than their draft": "hindsight_better",
        },
    ),
    Curves(
        "Groups without a success",
        {
            "before": "hindsight_all_fail_groups",
            "of them mixed by a revision": "hindsight_all_fail_became_mixed",
        },
        "Only a group whose rewards differ carries a gradient.",
    ),
    Curves("Reward of the revisions", {"mean": "hindsight_reward_mean"}),
]
TIME = [
    Computed(
        phases,
        [
            Curves(
                "Seconds per step",
                {
                    "in all": "step_seconds",
                    "rollout": "seconds_rollout",
                    "update": "seconds_update",
                },
            )
        ],
    ),
    Curves(
        "Tokens per second",
        {"rollout": "tokens_per_second_rollout", "training": "tokens_per_second_train"},
    ),
]
HEALTH = [
    Curves("Gradient norm", {"before clipping": "grad_norm"}),
    Curves("Clipped share of the tokens", {"low": "clip_frac_low", "high": "clip_frac_high"}),
    Curves(
        "Engine against trainer, log-prob",
        {"mean difference": "mismatch_mean", "largest": "mismatch_max"},
        "Large values: the engine samples from another policy than the one trained.",
    ),
    Curves("Peak memory, GiB", {"peak": "peak_memory_gib"}, smooth=False),
    Curves("Learning rate", {"lr": "lr"}, smooth=False),
    Curves("Loss", {"loss": "loss"}, zero=False),
]
EXPERIENCE_SECTIONS = (
    Section("Learning", LEARNING),
    Section("Experience replay", REPLAY, only_with="replay_active"),
    Section("Resampling by a prior policy", PRIOR, only_with="prior_completions"),
    Section("Hindsight", HINDSIGHT, only_with="hindsight_revisions"),
)
MACHINE_SECTIONS = (Section("Time", TIME), Section("Health", HEALTH))
