"""Run directories as the trainer leaves them, and a reader of the page about them."""

from __future__ import annotations

import json
from html.parser import HTMLParser

from exgrpo_fast.run.sinks import CompletionLog, JsonlSink


def step_metrics(step, *, replay=True):
    metrics = {
        "loss": 0.01,
        "reward_mean": 0.2 + 0.001 * step,
        "pass_at_1": 0.2 + 0.001 * step,
        "entropy": 0.9,
        "learnable_frac": 0.5,
        "all_fail_frac": 0.3,
        "all_pass_frac": 0.2,
        "completion_len_mean": 400.0,
        "truncated_frac": 0.1,
        "tokens_generated": 1000,
        "tokens_trained": 900,
        "step_seconds": 30.0,
        "seconds_rollout": 20.0,
        "seconds_update": 8.0,
        "peak_memory_gib": 15.25,
        "skipped": 0,
        "reasons": {"ok": 10, "wrong": 30},
        "grad_norm": 0.7,
    }
    if replay:
        metrics |= {
            "replay_active": 1,
            "replay_size": 3 * step,
            "retired_size": step,
            "replay_frac": 0.3,
            "replay_buckets": [step, 0, 2 * step],
            "replay_ages": [4, step, 0, 5 * step],
            "replay_ratio_mean": 1.0,
            "replay_ratio_p99": 3.5,
        }
    return metrics


def rows(reward, *, question="q1", text="so it is 4"):
    base = {"question_id": question, "prompt": "What is 2 + 2?", "answer": "4", "reason": "ok"}
    return [
        {**base, "completion": text, "reward": reward, "num_tokens": 5},
        {**base, "completion": "maybe 5", "reward": 0.0, "num_tokens": 4},
    ]


EVALUATION = {"n": 8, "questions": 256, "truncated": 0.1}


def make_run(folder, *, steps=20, replay=True):
    sink = JsonlSink(folder / "metrics.jsonl")
    for step in range(1, steps + 1):
        sink.log(step, step_metrics(step, replay=replay))
    log = CompletionLog(folder / "completions")
    log.write(1, rows(0.0, text="no idea <script>alert(1)</script>\x1b[2J"))
    log.write(steps, rows(1.0))
    (folder / "config.yaml").write_text(
        "method: exgrpo\nmodel: {name: org/model}\ntrain: {lr: 1.0e-06}\n"
    )
    (folder / "env.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": "2.13"}}))
    before = {"avg_at_n": 0.2, "avg_at_n_low": 0.18, "avg_at_n_high": 0.22}
    after = {"avg_at_n": 0.5, "avg_at_n_low": 0.47, "avg_at_n_high": 0.53}
    summary = {
        "method": "exgrpo",
        "steps": steps,
        "wall_seconds": 620.0,
        "peak_memory_gib": 15.25,
        "eval_before": {**EVALUATION, **before, "pass_at_k": {"1": 0.2, "8": 0.5}},
        "eval_after": {**EVALUATION, **after, "pass_at_k": {"1": 0.5, "8": 0.75}},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


class Page(HTMLParser):
    """Text, tags and addresses of a page; complains about tags that do not match."""

    VOID = {"meta", "path", "rect", "circle", "br"}
    OPTIONAL_END = {"p", "tr", "th", "td"}

    def __init__(self, html):
        super().__init__()
        self.text, self.tags, self.addresses, self.titles = "", [], [], []
        self._open = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in {"src", "href", "action", "xlink:href"}]
        if tag not in self.VOID | self.OPTIONAL_END:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID | self.OPTIONAL_END:
            assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] == "h3":
            self.titles.append(data)
        if self._open and self._open[-1] not in {"style", "script"}:
            self.text += data
