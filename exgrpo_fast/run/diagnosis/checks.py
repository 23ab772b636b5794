"""The checks of `exgrpo-fast diagnose`: series in, findings out.

Every threshold is a rule of thumb with its reason beside it. A rolling mean over `WINDOW` steps
stands for the value of a step, so that a single batch raises no alarm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from exgrpo_fast.run.diagnosis.logs import Log, Series

WINDOW = 5
# Keys that mend a finding, in the words of the trainer that wrote the log.
KEYS = {
    "exgrpo-fast": {
        "length": "rollout.max_completion_tokens",
        "lr": "train.lr",
        "group": "rollout.group_size",
        "kl": "algorithm.kl.coef",
        "entropy": "algorithm.clip_high, algorithm.entropy_coef",
        "reward": "reward.functions; exgrpo-fast reward-test",
        "hard": "easier questions, more steps, recipe eapo with a stronger prior",
        "easy": "data.train with harder questions",
        "sync": "rollout.mismatch, rollout.engine",
        "clip": "train.max_grad_norm",
    },
    "TRL": {
        "length": "max_completion_length",
        "lr": "learning_rate",
        "group": "num_generations",
        "kl": "beta",
        "entropy": "epsilon_high, entropy_coef",
        "reward": "reward_funcs",
        "hard": "easier prompts, num_generations, a replay buffer (ReplayGRPOTrainer)",
        "easy": "train_dataset with harder prompts",
        "sync": "vllm_importance_sampling_correction",
        "clip": "max_grad_norm",
    },
    "verl": {
        "length": "data.max_response_length",
        "lr": "actor_rollout_ref.actor.optim.lr",
        "group": "actor_rollout_ref.rollout.n",
        "kl": "actor_rollout_ref.actor.kl_loss_coef",
        "entropy": "actor_rollout_ref.actor.clip_ratio_high, entropy_coeff",
        "reward": "reward.custom_reward_function",
        "hard": "easier prompts, actor_rollout_ref.rollout.n, a custom sampler with replay",
        "easy": "data.train_files with harder prompts",
        "sync": "algorithm.rollout_correction",
        "clip": "actor_rollout_ref.actor.grad_clip",
    },
}


@dataclass(frozen=True)
class Finding:
    """What is wrong or worth a look, since when, and which key changes it."""

    check: str
    is_wrong: bool  # False: worth a look
    text: str  # one sentence with its number
    since_step: int | None
    key: str

    def line(self) -> str:
        mark = "WRONG" if self.is_wrong else "note "
        since = "" if self.since_step is None else f" (since step {self.since_step})"
        return f"{mark}  {self.check}: {self.text}{since} -> {self.key}"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def rolling(series: Series) -> Series:
    """(step, mean of the last `WINDOW` values up to it)."""
    values = [value for _, value in series]
    return [(at, mean(values[max(0, i + 1 - WINDOW) : i + 1])) for i, (at, _) in enumerate(series)]


def since(series: Series, holds: Callable[[float], bool]) -> int | None:
    """First step of the last unbroken stretch, up to the end, on which the rolling mean holds."""
    start = None
    for at, value in rolling(series):
        start = (at if start is None else start) if holds(value) else None
    return start


def tail(values: Sequence[float]) -> Sequence[float]:
    """The last quarter, at least `WINDOW` values where there are so many."""
    return values[-max(WINDOW, len(values) // 4) :]


def ends(log: Log, signal: str) -> tuple[float, float] | None:
    """Mean of the first `WINDOW` values and of the last quarter; None where they would overlap."""
    values = log.values(signal)
    return None if len(values) < 2 * WINDOW else (mean(values[:WINDOW]), mean(tail(values)))


def gained(log: Log) -> float | None:
    """Reward of the last quarter minus that of the first steps."""
    rewards = ends(log, "reward")
    return rewards and rewards[1] - rewards[0]


def wrong(
    log: Log, check: str, text: str, key: str, signal: str, holds: Callable[[float], bool]
) -> Finding:
    """A fault since `holds` is true of the signal; `key`: of KEYS."""
    return Finding(check, True, text, since(log.series[signal], holds), KEYS[log.trainer][key])


# ---- checks --------------------------------------------------------------------------------------


def zero_variance(log: Log) -> Iterator[Finding]:
    """Groups whose rewards are all equal have no gradient: above 0.7 most of the work is lost."""
    shares = log.values("zero_variance")
    if not shares or (share := mean(tail(shares))) <= 0.7:
        return
    begun = since(log.series["zero_variance"], lambda value: value > 0.7)
    text = f"{share:.0%} of groups carry no gradient"
    fail, passed = log.values("all_fail"), log.values("all_pass")
    reward = mean(tail(log.values("reward"))) if log.values("reward") else None
    is_hard = mean(tail(fail)) >= mean(tail(passed)) if fail and passed else None
    if is_hard is None and reward is not None:
        is_hard = reward < 0.5
    if is_hard:
        text += ": hardly any completion is correct" if reward is None else f": reward {reward:.3g}"
    elif is_hard is False:
        text += ": nearly all completions are correct"
    key = KEYS[log.trainer]["easy" if is_hard is False else "hard"]
    # A solved task is no fault of the run.
    yield Finding("zero-variance groups", is_hard is not False, text, begun, key)


def entropy(log: Log) -> Iterator[Finding]:
    """Below a fifth of its start exploration is nearly over; wrong where reward no longer gains."""
    first, last = ends(log, "entropy") or (0.0, 0.0)
    if first <= 0:
        return
    if last < 0.2 * first:
        text, rose = f"{first:.3g} -> {last:.3g} nats", gained(log)
        found = wrong(
            log, "entropy collapse", text, "entropy", "entropy", lambda value: value < 0.2 * first
        )
        yield replace(found, is_wrong=rose is None or rose <= 0.02)
    high = max(2.0 * first, first + 0.5)
    if last > high:
        text = f"{first:.3g} -> {last:.3g} nats: the policy drifts towards noise"
        yield wrong(log, "entropy growth", text, "lr", "entropy", lambda value: value > high)


# Signals whose last quarter may not exceed a limit: (signal, limit, check, text, key). Truncation: a
# truncated completion has no answer, so the limit shapes the reward. Mismatch: ten times what
# bfloat16 rounding makes. The others are far outside trust region and reference.
DRIFT = "ratio and KL drift"
LIMITS = [
    ("truncated", 0.2, "truncation", "{:.0%} of completions reach the length limit", "length"),
    (
        "mismatch",
        0.02,
        "engine mismatch",
        "engine and trainer differ by {:.3g} nats a token",
        "sync",
    ),
    ("clip_frac", 0.3, DRIFT, "{:.3g} of tokens are clipped", "lr"),
    (
        "kl_behaviour",
        0.1,
        DRIFT,
        "{:.3g} nats between behaviour and updated policy, per token",
        "lr",
    ),
    ("kl_ref", 0.5, DRIFT, "{:.3g} nats from the reference policy, per token", "kl"),
]


def limits(log: Log) -> Iterator[Finding]:
    """Signals above their limit."""
    for signal, limit, check, text, key in LIMITS:
        values = log.values(signal)
        if values and (value := mean(tail(values))) > limit:
            yield wrong(log, check, text.format(value), key, signal, lambda v, most=limit: v > most)


def length_growth(log: Log) -> Iterator[Finding]:
    """Twice the length without more reward: the reward favours length."""
    lengths, rose = ends(log, "length"), gained(log)
    if lengths is None or rose is None:
        return
    first, last = lengths
    if last > 2 * first and rose <= 0.02:
        text = f"{first:.0f} -> {last:.0f} tokens, reward {rose:+.3f}"
        yield wrong(log, "length growth", text, "length", "length", lambda value: value > 2 * first)


def reward_faults(log: Log) -> Iterator[Finding]:
    """A reward that fails counts as 0 or as nothing; one that never differs teaches nothing."""
    errors = log.values("reward_errors")
    if errors and (share := mean(tail(errors))) > 0.05:
        text = f"the reward fails on {share:.0%} of completions"
        yield wrong(log, "reward faults", text, "reward", "reward_errors", lambda v: v > 0.05)
    rewards = log.values("reward")
    if len(rewards) >= WINDOW and max(rewards) == min(rewards):
        text, begun = (
            f"every step has the same mean reward, {rewards[0]:.3g}",
            log.series["reward"][0][0],
        )
        yield Finding("reward faults", True, text, begun, KEYS[log.trainer]["reward"])


def reward_fall(log: Log) -> Iterator[Finding]:
    """The end lies a quarter of the whole range below the best stretch."""
    points = rolling(log.series.get("reward", []))[WINDOW - 1 :]
    if len(points) < 2 * WINDOW:
        return
    best_at, best = max(points, key=lambda point: point[1])
    lowest, last = min(value for _, value in points), points[-1][1]
    # 0.05: the noise of a batch of a few hundred completions
    if best - last > max(0.25 * (best - lowest), 0.05) and points[-1][0] > best_at:
        text = f"{best:.3g} at step {best_at}, {last:.3g} at the end"
        yield Finding("reward fell", True, text, best_at, KEYS[log.trainer]["lr"])


def updates(log: Log) -> Iterator[Finding]:
    """Learning rate and gradient norm."""
    rates, lr_key = log.values("lr"), KEYS[log.trainer]["lr"]
    if rates and max(rates) == 0.0:
        begun = log.series["lr"][0][0]
        yield Finding("learning rate", True, "it is 0 in every step", begun, lr_key)
    uses_lora = bool((log.config.get("model") or {}).get("lora"))
    # Full fine-tunes by RL use 1e-6 to 1e-5; toys and adapters more.
    if rates and not uses_lora and max(rates) > 1e-4 and log.trainer != "exgrpo-fast":
        text = f"{max(rates):.1e} is large for a full fine-tune"
        yield Finding("learning rate", False, text, None, lr_key)
    first, last = ends(log, "grad_norm") or (0.0, 0.0)
    if first > 0 and last > 20 * first:
        text = f"{first:.3g} -> {last:.3g}"
        found = wrong(
            log, "gradient norm", text, "clip", "grad_norm", lambda value: value > 20 * first
        )
        yield replace(found, key=f"{lr_key}, {found.key}")
    skipped = log.values("skipped_updates")
    if skipped and sum(skipped) > 0.2 * len(skipped):
        text = f"{sum(skipped):.0f} updates in {len(skipped)} steps were refused or empty"
        yield Finding("updates", False, text, None, KEYS[log.trainer]["group"])


CHECKS = (reward_faults, zero_variance, limits, entropy, length_growth, reward_fall, updates)


def diagnose(log: Log) -> list[Finding]:
    """All findings, those that are wrong first."""
    found = [finding for check in CHECKS for finding in check(log)]
    return sorted(found, key=lambda finding: not finding.is_wrong)
