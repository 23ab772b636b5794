"""The store on disk: columns of tensors and the names of the questions.

A snapshot is loaded only when all of it fits: the format, the tokenizer, the group size, every
question, every number. Then trajectories come back in the order in which they came, so that a run
goes on as if it had not stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from exgrpo_fast.experience.question_stream import refuse_unknown
from exgrpo_fast.experience.replay.store import COLUMNS, Experiences, ExperienceStore
from exgrpo_fast.model.packing import Ragged

FORMAT = 3
MOVED_AT_ONCE = 1024


def stored_rows(store: ExperienceStore) -> Tensor:
    """Rows in use, in the order of arrival."""
    rows = (store.rows["question"] >= 0).nonzero().flatten()
    return rows[store.rows["serial"][rows].argsort()]


def read_to_host(store: ExperienceStore, rows: Tensor) -> Experiences:
    """On the CPU, a part at a time: the addresses of all tokens at once are larger than the store."""
    found = [store.read(part).cpu() for part in rows.split(MOVED_AT_ONCE)]
    lengths = torch.cat([part.tokens.lengths for part in found])
    return Experiences(
        tokens=Ragged(torch.cat([part.tokens.values for part in found]), lengths),
        **{
            f.name: torch.cat([getattr(part, f.name) for part in found])
            for f in fields(Experiences)
            if f.name != "tokens"
        },
    )


def snapshot(
    store: ExperienceStore, question_ids: Sequence[str], *, vocabulary: str = ""
) -> dict[str, Any]:
    """Plain values and tensors; only questions of which something is known are named."""
    rows = stored_rows(store)
    kept = read_to_host(store, rows)
    known = (store.visits > 0) | store.retired | (store.bucket >= 0)
    known = (known | (store.num_rows_of_question() > 0)).nonzero().flatten().cpu()
    # Places in the data may change from run to run: rows name a place in `questions`.
    place = torch.full((store.plan.num_questions,), -1, dtype=torch.int64)
    place[known] = torch.arange(len(known))
    of_question = {
        name: getattr(store, name)[known.to(store.device)].cpu()
        for name in ("bucket", "successes", "visits", "last_visit", "retired")
    }
    columns = {f.name: getattr(kept, f.name) for f in fields(kept) if f.name in COLUMNS}
    columns |= {name: store.rows[name][rows].cpu() for name in ("serial", "on_host")}
    columns["question"] = place[kept.question]
    return {
        "format": FORMAT,
        "group_size": store.group_size,
        "vocabulary": vocabulary,
        "next_serial": store.next_serial,
        "num_evicted": store.num_evicted,
        "questions": [question_ids[i] for i in known.tolist()],
        "of_question": of_question,
        "trajectories": columns,
        "lengths": kept.tokens.lengths,
        "token_ids": kept.tokens.values,
        "behaviour_logprobs": kept.logprobs,
    }


def load_snapshot(
    store: ExperienceStore,
    state: Mapping[str, Any],
    place_of: Mapping[str, int],
    *,
    vocabulary: str = "",
) -> None:
    """Make the store what it was. ValueError in one line when the snapshot does not fit; the store
    is unchanged then."""
    check_snapshot(store, state, place_of, vocabulary)
    place = torch.tensor([place_of[name] for name in state["questions"]], dtype=torch.int64)
    columns = dict(state["trajectories"])
    columns.setdefault("advantage", torch.zeros(len(state["lengths"])))  # of an earlier version
    serial, on_host = columns.pop("serial"), columns.pop("on_host")
    columns["question"] = place[columns["question"]]
    kept = Experiences(
        tokens=Ragged(state["token_ids"], state["lengths"]),
        logprobs=state["behaviour_logprobs"],
        **columns,
    )
    store.clear()
    for there in (True, False):  # what lay on the host goes there before the device fills
        for part in parts(store, state["lengths"], (on_host == there).nonzero().flatten()):
            store.add(kept.pick(part))
            if there:
                store.spill()
    rows = stored_rows(store)
    in_order_of_loading = serial[on_host.byte().argsort(descending=True, stable=True)]
    serial_of = in_order_of_loading.to(store.device)
    store.rows["serial"][rows] = serial_of[store.rows["serial"][rows]]
    store.next_serial, store.num_evicted = state["next_serial"], state["num_evicted"]
    for name, values in state["of_question"].items():
        column = getattr(store, name)
        column[place.to(store.device)] = values.to(store.device, column.dtype)
    store.check_valid()


def parts(store: ExperienceStore, lengths: Tensor, index: Tensor) -> list[Tensor]:
    """An index in pieces of at most the size of the device's pages."""
    found, start, used = [], 0, 0
    for end, needed in enumerate(store.pages.pages_for(lengths[index]).tolist()):
        if used + needed > store.plan.num_pages or end - start == MOVED_AT_ONCE:
            found.append(index[start:end])
            start, used = end, 0
        used += needed
    return [*found, index[start:]]


def check_snapshot(
    store: ExperienceStore, state: Mapping[str, Any], place_of: Mapping[str, int], vocabulary: str
) -> None:
    if state.get("format") != FORMAT:
        raise ValueError(
            "its experience store was saved by an early version that kept no entropies and visits; "
            "start anew, or resume with that version"
        )
    if state["group_size"] != store.group_size:
        raise ValueError(
            f"the store was saved with group_size {state['group_size']}, this run has "
            f"{store.group_size}: buckets count successes and cannot be converted"
        )
    if state["vocabulary"] != vocabulary:
        raise ValueError(
            "the store was saved with another tokenizer: its token ids mean something else here"
        )
    refuse_unknown(set(state["questions"]), place_of.keys())
    lengths, tokens, logprobs = (
        state[name] for name in ("lengths", "token_ids", "behaviour_logprobs")
    )
    columns, of_question = state["trajectories"], state["of_question"]
    sizes = {len(column) for column in columns.values()} | {len(lengths)}
    known = {len(column) for column in of_question.values()} | {len(state["questions"])}
    question, bucket, retired = columns["question"], of_question["bucket"], of_question["retired"]
    sound = (
        len(sizes) == len(known) == 1
        and len(tokens) == len(logprobs) == int(lengths.sum())
        and bool((lengths > 0).all())
        and bool(((question >= 0) & (question < len(state["questions"]))).all())
        and bool(((bucket >= -1) & (bucket <= store.group_size)).all())
        and not bool((retired & (bucket >= 0)).any() or retired[question].any())
        and bool((tokens >= 0).all())
        and bool(logprobs.isfinite().all())
    )
    if not sound:
        raise ValueError("its experience store is damaged: lengths, buckets or numbers are wrong")
    longest = int(lengths.max()) if len(lengths) else 0
    if longest > store.plan.max_tokens:
        raise ValueError(
            f"the store holds a trajectory of {longest} tokens; this run takes at most "
            f"{store.plan.max_tokens} (rollout.max_completion_tokens)"
        )
    pages = int(store.pages.pages_for(lengths).sum())
    room = store.plan.num_pages + store.plan.num_host_pages
    if len(lengths) > store.plan.num_trajectories or pages > room:
        raise ValueError(
            f"the store holds {len(lengths)} trajectories of {pages} pages; this run has room for "
            f"{store.plan.num_trajectories} of {room}: raise replay.store.max_gib"
        )
