"""Every metric of metrics.jsonl: its name, its unit and what it means.

Trainer, screen, report and docs/metrics.md use these names and no others; tests compare them. A value
is None where a step has nothing to measure; "correct of ..." and "..., of all" are shares.
"""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    name: str
    unit: str  # "" for a plain number, a share or a text
    meaning: str


PHASES = {  # of the clock; a phase inside another one is counted in itself alone
    "rollout": "generation of fresh completions",
    "reward": "rewards that were still open after generation",
    "score": "log-probs and entropies of fresh completions under the trainer's weights",
    "replay": "choosing, reading and storing trajectories",
    "prior": "resampling by the prior policy",
    "hindsight": "revisions of failed completions",
    "update": "forward passes, backward passes and optimiser",
    "sync": "sending weights to the engine, and checking them",
}

SECTIONS: dict[str, list[Metric]] = {
    "Step": [
        Metric("step", "", "number of finished steps, this one included"),
        Metric("loss", "", "mean loss of the step's updates"),
        Metric("loss_hex", "", "float.hex of the float32 loss: equal texts are equal bits"),
        Metric("reward_mean", "", "mean reward of all trajectories"),
        Metric("pass_at_1", "", "correct of all but prior-guided trajectories"),
        Metric("pass_at_1_fresh", "", "correct of fresh trajectories"),
        Metric("pass_at_1_replay_groups", "", "correct of fresh trajectories with a replayed one"),
        Metric("learnable_frac", "", "groups whose rewards differ, of all groups"),
        Metric("all_fail_frac", "", "groups without a correct trajectory, of all groups"),
        Metric("all_pass_frac", "", "groups with only correct trajectories, of all groups"),
        Metric("groups_discarded", "groups", "left out by dynamic sampling"),
        Metric("unscored", "completions", "without a reward, left out of their groups"),
        Metric("reasons", "trajectories", "count of each reason that a reward or a skip gave"),
    ],
    "Completions": [
        Metric("entropy", "nats", "mean entropy of a fresh token over the vocabulary"),
        Metric("entropy_fresh", "nats", "the same"),
        Metric("entropy_replay", "nats", "of a replayed token, when it was generated"),
        Metric("completion_len_mean", "tokens", "mean length of fresh completions"),
        Metric("completion_len_replay", "tokens", "mean length of replayed trajectories"),
        Metric("truncated_frac", "", "cut at the length limit, of fresh completions"),
        Metric("tokens_generated", "tokens", "fresh tokens"),
        Metric("generation_halvings", "", "times that generation ran out of memory"),
    ],
    "Engine against trainer": [
        Metric("mismatch_mean", "nats", "mean difference of a token's log-prob"),
        Metric("mismatch_p99", "nats", "its 99th percentile"),
        Metric("mismatch_max", "nats", "its maximum"),
        Metric("mismatch_kl", "nats", "KL(engine to trainer), k3 estimate"),
        Metric("mismatch_corrected_frac", "", "tokens cut or masked by the correction, of all"),
        Metric(
            "scored_frac",
            "",
            "with log-probs recomputed by the trainer, of fresh completions: docs/rollouts.md",
        ),
        Metric("staleness_mean", "updates", "between a token's weights and the present ones"),
        Metric("staleness_max", "updates", "the maximum of it"),
        Metric("servers_live", "servers", "rollout servers with the weights after the step"),
        Metric("requests_resent", "", "requests of the step that a lost server had not finished"),
        Metric("sync_gap", "nats", "mean difference on the fixed prompt after a weight sync"),
    ],
    "Update": [
        Metric("tokens_trained", "tokens", "completion tokens with a nonzero weight in the loss"),
        Metric("num_trained", "tokens", "the same, as the loss has counted them"),
        Metric("num_shaped", "tokens", "of them with the shaped ratio"),
        Metric("grad_norm", "", "largest gradient norm of the step's updates, before clipping"),
        Metric("lr", "", "learning rate of the last update"),
        Metric("skipped", "updates", "skipped: a bad gradient, or nothing to learn"),
        Metric("ratio_mean", "", "mean importance ratio of unshaped tokens"),
        Metric("ratio_max", "", "its maximum"),
        Metric("clip_frac_low", "", "clipped at the lower bound, of unshaped tokens"),
        Metric("clip_frac_high", "", "clipped at the upper bound, of unshaped tokens"),
        Metric("dual_clip_frac", "", "cut by dual-clip, of unshaped tokens"),
        Metric(
            "tv_frac", "", "without a gradient because of tv_low or tv_high, of unshaped tokens"
        ),
        Metric("log_ratio_clamped", "tokens", "whose log-ratio was clamped to 20 or -20"),
        Metric("approx_kl", "nats", "KL(behaviour to policy), k3 estimate, unshaped tokens"),
        Metric("shaped_mean", "", "mean shaped ratio of the shaped tokens"),
        Metric("entropy_mean", "nats", "mean entropy of the trained tokens during the update"),
        Metric("kl_ref", "nats", "mean KL term to the reference policy"),
        Metric("teacher_divergence", "nats", "mean divergence to the teacher: docs/losses.md"),
        Metric("density", "", "tiles of the head that the backward pass computed, of all"),
        Metric(
            "skipped_mass",
            "",
            "absolute gradient of the logits in the tiles that it skipped, of all",
        ),
        Metric("rows_skipped", "tokens", "without a gradient, left out of the backward pass"),
        Metric("padding_frac", "", "padding, of the tokens in the forward passes"),
        Metric(
            "prompt_tokens_shared_frac",
            "",
            "prompt tokens computed once for several completions, of all",
        ),
        Metric("chunk_halvings", "", "times that the loss ran out of memory and halved its chunk"),
        Metric("microbatch_halvings", "", "times that a pack ran out of memory and was halved"),
    ],
    "Replay": [
        Metric("replay_active", "", "1 once replay has started"),
        Metric("replay_frac", "", "groups with a replayed trajectory, of all groups"),
        Metric("replay_size", "questions", "in the replay buffer, to be asked again"),
        Metric("replay_trajectories", "trajectories", "in the replay buffer"),
        Metric("replay_bytes", "bytes", "of their tokens and log-probs"),
        Metric("replay_evicted", "trajectories", "that made room for others, since the start"),
        Metric("replay_buckets", "questions", "in each bucket, fewest correct first"),
        Metric("replay_ages", "trajectories", "of age 0, 1, 2 to 3, 4 to 7, ... steps"),
        Metric("retired_size", "questions", "retired, because all of a group was correct"),
        Metric("replay_candidates", "trajectories", "scored for the choice"),
        Metric("replay_age_mean", "steps", "mean age of the replayed trajectories"),
        Metric("replay_age_max", "steps", "its maximum"),
        Metric("replay_entropy_selected", "nats", "mean entropy of the chosen trajectories"),
        Metric("replay_entropy_candidates", "nats", "mean entropy of all candidates"),
        Metric("replay_ratio_mean", "", "mean importance ratio of replayed tokens"),
        Metric("replay_ratio_p99", "", "its 99th percentile"),
        Metric("replay_ratio_max", "", "its maximum"),
    ],
    "Prior resampling": [
        Metric("prior_completions", "completions", "guided by the prior policy"),
        Metric("prior_redrawn_frac", "", "redrawn by the prior, of a completion's tokens"),
        Metric("prior_redrawn_p10", "", "its 10th percentile over completions"),
        Metric("prior_redrawn_p90", "", "its 90th percentile over completions"),
        Metric("prior_redrawn_by_decile", "", "the same in each tenth of the completions"),
        Metric("prior_reward_mean", "", "mean reward of guided completions"),
        Metric("prior_pass_at_1", "", "correct of guided completions"),
        Metric("prior_kept_frac", "", "left by the filter, of guided completions"),
        Metric("prior_groups_mixed", "groups", "whose rewards differ only by a guided completion"),
        Metric("prior_same_token_frac", "", "redrawn as the same token, of redrawn tokens"),
        Metric("prior_tested_at_triggers", "", "mean statistic of the drafts that were rejected"),
        Metric("prior_completion_len", "tokens", "mean length of guided completions"),
        Metric("prior_tokens", "tokens", "of guided completions"),
        Metric("prior_rounds", "", "rounds of drafting and testing"),
        Metric("prior_tokens_per_round", "tokens", "emitted in a round"),
        Metric("prior_waste", "", "drafted tokens for each emitted one"),
        Metric("prior_kl", "nats", "KL(policy to prior) on some fresh completions"),
        Metric("prior_rate_mean", "", "mean probability of a redraw, in the exact modes"),
        Metric("prior_seconds_draft", "s", "drafting by the policy"),
        Metric("prior_seconds_score", "s", "scoring by the prior"),
        Metric("prior_seconds_draw", "s", "drawing the replacements"),
        Metric("prior_ratio_kept_mean", "", "mean importance ratio of kept guided tokens"),
        Metric("prior_ratio_redrawn_mean", "", "mean importance ratio of redrawn tokens"),
        Metric("prior_clip_frac", "", "clipped, of guided tokens"),
    ],
    "Hindsight": [
        Metric("hindsight_groups_failed", "groups", "with completions to revise"),
        Metric("hindsight_revisions", "completions", "written with hindsight"),
        Metric("hindsight_skipped_long", "completions", "whose prompt would have been too long"),
        Metric("hindsight_better", "completions", "with a higher reward than their draft"),
        Metric("hindsight_joined", "completions", "that joined their group"),
        Metric(
            "hindsight_all_fail_groups",
            "groups",
            "without a correct completion before the revisions",
        ),
        Metric("hindsight_all_fail_became_mixed", "groups", "of them with a correct one after"),
        Metric("hindsight_tokens", "tokens", "of the revisions"),
        Metric("hindsight_reward_mean", "", "mean reward of the revisions"),
    ],
    "Held-out evaluation": [
        Metric("eval_avg_at_n", "", "correct of all samples of the held-out questions"),
        Metric("eval_pass_at_k", "", "k -> expected share of questions solved by k samples"),
    ],
    "Time, memory and disk": [
        Metric("step_seconds", "s", "of the step, without evaluation and checkpoint"),
        *(Metric(f"seconds_{phase}", "s", meaning) for phase, meaning in PHASES.items()),
        Metric("tokens_per_second_rollout", "tokens/s", "fresh tokens by seconds_rollout"),
        Metric("tokens_per_second_train", "tokens/s", "trained tokens by seconds_update"),
        Metric("peak_memory_gib", "GiB", "peak of torch's allocator on CUDA, else of the process"),
        Metric("save_failures", "", "checkpoints that could not be written, since the start"),
    ],
}
METRICS = {metric.name: metric for metrics in SECTIONS.values() for metric in metrics}
