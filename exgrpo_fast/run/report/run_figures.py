"""Which figures tell a run: what it learned, what it replayed, how fast, how healthy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from exgrpo_fast.core.text import clean_text
from exgrpo_fast.run.display import finite, number_of
from exgrpo_fast.run.report.figures import Line, Mark, heat_figure, line_figure, stacked_figure
from exgrpo_fast.run.report.reading import Run, interval

PHASES = ("rollout", "reward", "score", "update", "replay", "prior", "hindsight", "sync")


def learning_figures(run: Run) -> list[str]:
    return [
        _metrics_figure(
            run,
            "Reward and pass@1",
            ("reward", "reward_mean", 1),
            ("pass@1, all", "pass_at_1", 3),
            ("pass@1, fresh", "pass_at_1_fresh", 4),
            marks=_evaluation_marks(run),
            mark_name="held-out avg@n",
        ),
        _outcomes_figure(run),
        _metrics_figure(
            run,
            "Entropy",
            ("all", "entropy", 1),
            ("fresh", "entropy_fresh", 3),
            ("replayed", "entropy_replay", 2),
            note="Mean over tokens, in nats. A fall towards 0 means the policy stops exploring.",
        ),
        _metrics_figure(
            run,
            "Completion length",
            ("fresh", "completion_len_mean", 1),
            ("replayed", "completion_len_replay", 2),
        ),
        _metrics_figure(
            run,
            "Truncated share",
            ("cut at the length limit", "truncated_frac", 5),
            note="A cut completion rarely holds an answer.",
        ),
        _reasons_figure(run),
    ]


def replay_figures(run: Run) -> list[str]:
    if not any(run.total(key) for key in ("replay_size", "replay_frac", "replay_active")):
        return []
    started = [step for step, active in run.series("replay_active") if active]
    return [
        _metrics_figure(
            run,
            "Experience kept",
            ("questions to replay", "replay_size", 1),
            ("retired, solved for good", "retired_size", 3),
            smooth=False,
            note=f"Replay is active from step {started[0]}." if started else "",
        ),
        _buckets_figure(run),
        _ages_figure(run),
        _metrics_figure(run, "Replayed share of the batch", ("replayed", "replay_frac", 2)),
        _metrics_figure(
            run, "Age of replayed trajectories, in steps", ("mean", "replay_age_mean", 2)
        ),
        _metrics_figure(
            run,
            "Importance ratio of replayed tokens",
            ("mean", "replay_ratio_mean", 1),
            ("mean after shaping", "shaped_mean", 3),
            ("99th percentile", "replay_ratio_p99", 2),
        ),
    ]


def hindsight_figures(run: Run) -> list[str]:
    if not run.series("hindsight_revisions"):
        return []
    return [
        _metrics_figure(
            run,
            "Revisions of a step",
            ("written", "hindsight_revisions", 1),
            ("better than their draft", "hindsight_better", 3),
            ("joined their group", "hindsight_joined", 2),
        ),
        _metrics_figure(
            run,
            "Groups without a success",
            ("before", "hindsight_all_fail_groups", 5),
            ("of them mixed by a revision", "hindsight_all_fail_became_mixed", 3),
            note="Only a group whose rewards differ carries a gradient.",
        ),
        _metrics_figure(run, "Reward of the revisions", ("mean", "hindsight_reward_mean", 1)),
    ]


def prior_figures(run: Run) -> list[str]:
    if not run.series("prior_responses"):
        return []
    return [
        _metrics_figure(
            run,
            "Tokens redrawn by the prior",
            ("mean share", "prior_redrawn_frac", 1),
            ("10th percentile", "prior_redrawn_p10", 3),
            ("90th percentile", "prior_redrawn_p90", 2),
            note="It rises where the policy has become surer of a token than the prior.",
        ),
        _metrics_figure(
            run,
            "Guided and fresh responses",
            ("pass@1, guided", "prior_pass_at_1", 2),
            ("pass@1, fresh", "pass_at_1_fresh", 4),
        ),
        _metrics_figure(
            run, "Groups mixed only by a guided one", ("groups", "prior_groups_mixed", 3)
        ),
        _metrics_figure(
            run,
            "Ratio of guided tokens",
            ("kept", "prior_ratio_kept_mean", 1),
            ("redrawn", "prior_ratio_redrawn_mean", 2),
        ),
        _metrics_figure(run, "KL of policy to prior, in nats", ("fresh tokens", "prior_kl", 5)),
        _metrics_figure(
            run,
            "Drafts",
            ("tokens per round", "prior_tokens_per_round", 1),
            ("drafted per token", "prior_waste", 2),
        ),
    ]


def machine_figures(run: Run) -> list[str]:
    return [
        _phases_figure(run),
        _metrics_figure(
            run,
            "Tokens per second",
            ("rollout", "tokens_per_second_rollout", 1),
            ("training", "tokens_per_second_train", 2),
        ),
    ]


def health_figures(run: Run) -> list[str]:
    return [
        _metrics_figure(run, "Gradient norm", ("before clipping", "grad_norm", 1)),
        _metrics_figure(
            run,
            "Clipped share of the tokens",
            ("low", "clip_frac_low", 1),
            ("high", "clip_frac_high", 2),
        ),
        _metrics_figure(
            run,
            "Engine against trainer, log-probability",
            ("mean difference", "mismatch_mean", 1),
            ("largest", "mismatch_max", 2),
            note="Large values: the engine samples from another policy than the one trained.",
        ),
        _metrics_figure(run, "Peak memory, GiB", ("peak", "peak_memory_gib", 4), smooth=False),
        _metrics_figure(run, "Learning rate", ("lr", "lr", 1), smooth=False),
        _metrics_figure(run, "Loss", ("loss", "loss", 7), zero=False),
    ]


def _metrics_figure(
    run: Run, title: str, *curves: tuple[str, str, int], smooth: bool = True, **options: Any
) -> str:
    """Metrics as they are logged, each given as (name, key, colour)."""
    lines = [Line(name, run.series(key), colour, smooth) for name, key, colour in curves]
    return line_figure(title, lines, **options)


# --- figures whose data are not metrics as they are logged ---------------------------------------


def _evaluation_marks(run: Run) -> list[Mark]:
    """Held-out evaluations: before, during (from the metrics), after."""
    marks = {step: Mark(step, value) for step, value in run.series("eval_avg_at_n")}
    for key, step in (("eval_before", 0), ("eval_after", run.last_step)):
        if evaluation := run.evaluation(key):
            marks[step] = Mark(step, float(evaluation["avg_at_n"]), interval(evaluation))
    return [marks[step] for step in sorted(marks)]


def _outcomes_figure(run: Run) -> str:
    """Groups by outcome, or the learnable share alone where the rest is not known."""
    learnable, fail, passed = (
        run.series(key) for key in ("learnable_frac", "all_fail_frac", "all_pass_frac")
    )
    note = "Only groups whose rewards differ carry a gradient."
    if fail and passed:
        # with partial rewards a group may be learnable and all wrong: it counts as learnable
        taken = {step: share + dict(passed).get(step, 0.0) for step, share in learnable}
        fail = [(step, min(share, max(0.0, 1.0 - taken.get(step, 0.0)))) for step, share in fail]
        layers = [("all wrong", fail, 5), ("learnable", learnable, 3), ("all right", passed, 1)]
        return stacked_figure("Groups by outcome", layers, note=note, top=1.0)
    line = Line("learnable share", learnable, 3)
    return line_figure("Learnable share of the groups", [line], note=note, top=1.0)


def _reasons_figure(run: Run) -> str:
    """Why rewards were what they were, as shares of the scored completions."""
    counted = [(step["step"], _reason_counts(step)) for step in run.steps]
    totals: dict[str, float] = {}
    for _, counts in counted:
        for reason, count in counts.items():
            totals[reason] = totals.get(reason, 0) + count
    layers = []
    for colour, reason in enumerate(sorted(totals, key=lambda name: -totals[name])[:6], start=1):
        points = [
            (step, counts.get(reason, 0) / total)
            for step, counts in counted
            if (total := sum(counts.values()))
        ]
        layers.append((clean_text(reason, max_line=40), points, colour))
    return stacked_figure("Reasons of the rewards", layers, top=1.0)


def _reason_counts(step: Mapping[str, Any]) -> dict[str, float]:
    reasons = step.get("reasons")
    if not isinstance(reasons, dict):
        return {}
    return {str(name): count for name in reasons if (count := number_of(reasons, name))}


def _buckets_figure(run: Run) -> str:
    replay = run.config.get("replay")
    if isinstance(replay, dict) and replay.get("difficulty") == "reward_std":
        name = _bucket_of_all
        note = "Questions by how much the rewards of their group differed."
    else:
        name = _bucket_of_mixed
        note = "Questions by how many of their group's answers were right."
    return _counts_figure(run, "Replay buckets", "replay_buckets", name, of="questions", note=note)


def _bucket_of_mixed(row: int, num_rows: int) -> str:
    """Those solved never or always have no bucket: 1..K-1 are logged."""
    return f"{row + 1}/{num_rows + 1}"


def _bucket_of_all(row: int, num_rows: int) -> str:
    """0..K are logged."""
    return f"{row}/{num_rows - 1}"


def _ages_figure(run: Run) -> str:
    return _counts_figure(
        run,
        "Ages of stored trajectories",
        "replay_ages",
        _age_span,
        of="trajectories",
        note="Steps since they were born, by powers of two: 4+ is 4 to 7, and only the last is open.",
    )


def _age_span(row: int, num_rows: int) -> str:
    return f"{2 ** (row - 1)}+" if row else "0"


def _counts_figure(
    run: Run, title: str, key: str, name: Callable[[int, int], str], **options: str
) -> str:
    """A metric that is a list of counts; `name(row, num_rows)` is what one of them counts."""
    logged = [(s["step"], s[key]) for s in run.steps if isinstance(s.get(key), list)]
    num_rows = max((len(counts) for _, counts in logged), default=0)
    columns = [(step, _numbers(counts, num_rows)) for step, counts in logged]
    return heat_figure(title, columns, [name(r, num_rows) for r in range(num_rows)], **options)


def _numbers(counts: Sequence[Any], num_rows: int) -> list[float]:
    """The counts of a step, 0 for each that is missing or no number."""
    return [finite(count) or 0.0 for count in counts] + [0.0] * (num_rows - len(counts))


def _phases_figure(run: Run) -> str:
    timed = [name for name in PHASES if run.series(f"seconds_{name}")]
    layers = [
        (name, run.series(f"seconds_{name}"), colour) for colour, name in enumerate(timed, start=1)
    ]
    known: dict[int, float] = {}
    for _, points, _ in layers:
        for step, seconds in points:
            known[step] = known.get(step, 0.0) + seconds
    rest = [(step, max(s - known.get(step, 0.0), 0.0)) for step, s in run.series("step_seconds")]
    return stacked_figure("Seconds per step, by phase", [*layers, ("other", rest, 7)])
