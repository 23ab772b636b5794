"""The experience store: trajectories in token pages, and what is known of their questions.

Two tables on the training device. A row of the first is one trajectory; free rows have question
-1. A row of the second is one question of the data, by its place there:

    bucket -1       the question is not stored
    bucket k        stored; for verified rewards k is the successes of its latest mixed visit
    retired         solved K times out of K; it left for good

Every change is a handful of tensor operations over whole columns. None loops over trajectories, and
none waits for the device, save when free rows or pages run out (`_make_room`) or a limit on the
trajectories of a question, or on groups, is set.

ExGRPO (arXiv 2510.02245), section 3.2.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from exgrpo_fast.experience.replay.plan import StorePlan
from exgrpo_fast.experience.replay.token_pages import TokenPages
from exgrpo_fast.model.packing import Ragged, places

Evict = Literal["entropy", "oldest"]

NOBODY = -1
LOGPROB_DTYPES = {4: torch.float32, 2: torch.bfloat16}
EVICTION_SHARE = 50  # a full store lets go of 1/50 at once: it then need not sort at every step


@dataclass(frozen=True)
class Experiences:
    """Trajectories as columns, one entry each; tokens and log-probs are joined end to end."""

    question: Tensor  # int64 [A], places in the data
    tokens: Ragged  # int32 or int64, N tokens
    logprobs: Tensor  # float32 [N], under the policy that produced them
    birth_step: Tensor  # int64 [A]
    reward: Tensor  # float32 [A]
    success: Tensor  # bool [A]
    truncated: Tensor  # bool [A], the length limit ended it
    entropy: Tensor  # float32 [A], last known mean entropy in nats; inf = never scored
    group: Tensor  # int64 [A], equal for those generated together
    score: Tensor  # float32 [A], of the group, for those who replay whole groups
    advantage: Tensor  # float32 [A], in its group when it was generated

    def __len__(self) -> int:
        return len(self.question)

    def cpu(self) -> Experiences:
        columns = {f.name: getattr(self, f.name).cpu() for f in fields(self) if f.name != "tokens"}
        # not Ragged.to: it does not wait, and on the host the values are read at once
        tokens = Ragged(self.tokens.values.cpu(), self.tokens.lengths)
        return Experiences(tokens=tokens, **columns)

    def pick(self, index: Tensor) -> Experiences:
        """Some of them, by an index on the CPU."""
        return Experiences(
            tokens=self.tokens.pick(index),
            logprobs=Ragged(self.logprobs, self.tokens.lengths).pick(index).values,
            **{
                f.name: getattr(self, f.name)[index.to(self.question.device)]
                for f in fields(self)
                if f.name in COLUMNS
            },
        )


COLUMNS = {  # of a stored trajectory beside its pages
    "question": torch.int32,
    "serial": torch.int64,  # order of arrival; orders candidates, on any device and after a resume
    "digest": torch.int64,
    "group": torch.int64,
    "length": torch.int32,
    "birth_step": torch.int32,
    "reward": torch.float32,
    "entropy": torch.float32,
    "score": torch.float32,
    "advantage": torch.float32,
    "success": torch.bool,
    "truncated": torch.bool,
    "on_host": torch.bool,
}


@dataclass(eq=False)
class ExperienceStore:
    """A fixed amount of memory that holds trajectories of the questions 0 .. num_questions - 1.

    `evict`: who leaves a full store, or a question with more than `max_per_question`: the highest
    last-known entropy, or the oldest. `max_groups`: only the groups of the highest score stay.
    `max_trajectories`: only the newest stay, but for a share `spare_correct` of them, which are the
    newest correct ones among the older.
    """

    plan: StorePlan
    _: KW_ONLY
    group_size: int
    device: torch.device | str = "cpu"
    evict: Evict = "entropy"
    max_per_question: int | None = None
    max_groups: int | None = None
    max_trajectories: int | None = None
    spare_correct: float = 0.0
    deduplicate: bool = True

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(f"group_size must be at least 2, got {self.group_size}")
        self.clear()

    def clear(self) -> None:
        """Empty, as it was made."""
        plan, device = self.plan, self.device
        questions = plan.num_questions
        self.bucket = torch.full((questions,), NOBODY, dtype=torch.int16, device=device)
        self.successes = torch.zeros(questions, dtype=torch.int16, device=device)  # latest visit
        self.visits = torch.zeros(questions, dtype=torch.int32, device=device)
        self.last_visit = torch.zeros(questions, dtype=torch.int32, device=device)
        self.retired = torch.zeros(questions, dtype=torch.bool, device=device)
        self.rows = {
            name: torch.zeros(plan.num_trajectories, dtype=dtype, device=device)
            for name, dtype in COLUMNS.items()
        }
        self.rows["question"].fill_(NOBODY)
        shape = (plan.num_trajectories, plan.pages_per_trajectory)
        self.table = torch.zeros(shape, dtype=torch.int32, device=device)
        self._free_rows = torch.arange(plan.num_trajectories, device=device)
        self.pages = TokenPages(
            plan.num_pages,
            plan.page_tokens,
            logprob_dtype=LOGPROB_DTYPES[plan.logprob_bytes],
            device=device,
        )
        self.host_pages = TokenPages(
            plan.num_host_pages,
            plan.page_tokens,
            logprob_dtype=LOGPROB_DTYPES[plan.logprob_bytes],
            pinned=torch.device(device).type == "cuda",
        )
        self.next_serial = 0
        self.num_evicted = 0  # trajectories that a full store or question let go

    # --- reading ---

    @property
    def num_bytes(self) -> int:
        """What was allocated on the training device."""
        tensors = [self.bucket, self.successes, self.visits, self.last_visit, self.retired]
        tensors += [*self.rows.values(), self.table]
        free = 8 * self.plan.num_trajectories + 4 * self.plan.num_pages
        return sum(t.numel() * t.element_size() for t in tensors) + free + self.pages.num_bytes

    def __len__(self) -> int:
        """|E|, the number of stored questions. Waits for the device."""
        return int((self.bucket >= 0).sum())

    @property
    def num_trajectories(self) -> int:
        return int((self.rows["question"] >= 0).sum())

    def num_rows_of_question(self) -> Tensor:
        """int64 [num_questions]: trajectories of each."""
        owner = self.rows["question"].long() + 1
        return torch.bincount(owner, minlength=self.plan.num_questions + 1)[1:]

    def bucket_sizes(self) -> list[int]:
        """Questions in the buckets 0..K."""
        return torch.bincount(self.bucket.long() + 1, minlength=self.group_size + 2)[1:].tolist()

    def by_bucket(self) -> Tensor:
        """int64 [num_questions]: bucket after bucket, those not stored first, in the data's order."""
        return self.bucket.argsort(stable=True)

    def rows_of(self, questions: Tensor) -> tuple[Tensor, Tensor]:
        """(rows [C], owner [C]): all trajectories of some distinct questions [Q].

        `owner` is the place in `questions`; sorted by owner, then by arrival.
        """
        place = torch.full((self.plan.num_questions + 1,), NOBODY, device=self.device)
        place[questions] = torch.arange(len(questions), device=self.device)
        owner_of_row = place[self.rows["question"].long()]  # row -1 is the spare last entry
        rows = (owner_of_row >= 0).nonzero().flatten()
        rows = rows[self.rows["serial"][rows].argsort()]
        rows = rows[owner_of_row[rows].argsort(stable=True)]
        return rows, owner_of_row[rows]

    def read(self, rows: Tensor) -> Experiences:
        """The trajectories of some rows [A]. Their lengths are copied to the host: one wait."""
        lengths, on_host = torch.stack(
            [self.rows["length"][rows].long(), self.rows["on_host"][rows].long()]
        ).cpu()
        column = {name: values[rows] for name, values in self.rows.items()}
        tokens, logprobs = self._read_pages(rows, lengths, on_host.bool())
        return Experiences(
            question=column["question"].long(),
            tokens=Ragged(tokens, lengths),
            logprobs=logprobs,
            birth_step=column["birth_step"].long(),
            **{name: column[name] for name in ("reward", "success", "truncated", "entropy")},
            **{name: column[name] for name in ("group", "score", "advantage")},
        )

    def _read_pages(self, rows: Tensor, lengths: Tensor, on_host: Tensor) -> tuple[Tensor, Tensor]:
        table = self.table[rows]
        if not on_host.any():
            return self.pages.read(table, lengths)
        count = int(lengths.sum())
        tokens = torch.empty(count, dtype=torch.int32, device=self.device)
        logprobs = torch.empty(count, device=self.device)
        of_row, _ = places(lengths, self.device)
        for pages, here in ((self.pages, ~on_host), (self.host_pages, on_host)):
            part = table[here.to(self.device)].to(pages.tokens.device)
            at = here.to(self.device)[of_row]
            tokens[at], logprobs[at] = (
                values.to(self.device, non_blocking=True)
                for values in pages.read(part, lengths[here])
            )
        return tokens, logprobs

    # --- what a step brings ---

    def add(self, new: Experiences) -> None:
        """Keep trajectories, unless their question is retired or keeps the very same tokens.

        ValueError for a trajectory that is empty or longer than the plan's, an unknown question,
        or a number that is not finite: nothing is kept then.
        """
        self._check(new)
        if len(new) == 0:
            return
        lengths = new.tokens.lengths
        self._make_room(len(new), int(self.pages.pages_for(lengths).sum()))
        rows, self._free_rows = self._free_rows[: len(new)], self._free_rows[len(new) :]
        columns = {
            f.name: getattr(new, f.name).to(self.device, non_blocking=True)
            for f in fields(new)
            if f.name in COLUMNS
        }
        question = columns["question"].long()
        tokens = new.tokens.to(self.device)
        columns["digest"] = token_digests(tokens) ^ scramble(question)
        accepted = ~self.retired[question]
        if self.deduplicate:
            accepted &= self._first_copies(columns["digest"])
        columns["question"] = torch.where(accepted, question, NOBODY)
        columns["serial"] = torch.arange(len(new), device=self.device) + self.next_serial
        columns["length"] = lengths.to(self.device, non_blocking=True)
        columns["on_host"] = torch.zeros_like(accepted)
        self.next_serial += len(new)
        for name, values in columns.items():
            self.rows[name][rows] = values.to(COLUMNS[name])
        table = self.pages.take(lengths, self.plan.pages_per_trajectory)
        self.table[rows] = table
        self.pages.write(table, tokens, new.logprobs)
        if self.max_per_question is not None:
            self._trim(question.unique())
        if self.max_groups is not None:
            self._keep_best_groups(self.max_groups)
        if self.max_trajectories is not None:
            self._keep_newest(self.max_trajectories)

    def visit(self, questions: Tensor, successes: Tensor, *, step: int) -> None:
        """Note the outcome of groups."""
        questions = questions.to(self.device, non_blocking=True)
        self.successes[questions] = successes.to(self.device, torch.int16, non_blocking=True)
        self.visits.index_add_(0, questions, torch.ones_like(questions, dtype=torch.int32))
        self.last_visit[questions] = step

    def move(self, questions: Tensor, buckets: Tensor) -> None:
        """Put questions into buckets, but for retired ones."""
        questions = questions.to(self.device, non_blocking=True)
        buckets = buckets.to(self.device, torch.int16, non_blocking=True)
        self.bucket[questions] = buckets.masked_fill(self.retired[questions], NOBODY)

    def retire(self, questions: Tensor) -> None:
        """The questions leave for good, and their trajectories with them."""
        self.retired[questions.to(self.device, non_blocking=True)] = True
        self.bucket.masked_fill_(self.retired, NOBODY)
        owner = self.rows["question"]
        owner.masked_fill_((owner >= 0) & self.retired[owner.long()], NOBODY)

    def drop(self, gone: Tensor) -> None:
        """Forget the trajectories of a mask [num_trajectories]; questions left without one leave."""
        owner = self.rows["question"]
        had = self.num_rows_of_question() > 0
        owner.masked_fill_(gone, NOBODY)
        self.bucket.masked_fill_(had & (self.num_rows_of_question() == 0), NOBODY)

    def note_entropy(self, rows: Tensor, entropies: Tensor) -> None:
        self.rows["entropy"][rows] = entropies.to(self.device, torch.float32)

    def spill(self) -> None:
        """Move as much as the host has room for off the device."""
        self._reclaim()
        rows = self._coldest_first(on_host=False)
        pages = self.pages.pages_for(self.rows["length"][rows]).cumsum(0)
        self._move_to_host(rows[pages <= self.host_pages.num_free])
        self._reclaim()

    # --- room ---

    def _make_room(self, num_rows: int, num_pages: int) -> None:
        """Free rows and pages for what comes; this alone waits for the device, and rarely."""
        if self._has_room(num_rows, num_pages):
            return
        self._reclaim()
        if self._has_room(num_rows, num_pages):
            return
        if num_rows > self.plan.num_trajectories or num_pages > self.plan.num_pages:
            raise ValueError(
                f"{num_rows} trajectories of {num_pages} pages at once; the store holds "
                f"{self.plan.num_trajectories} and {self.plan.num_pages}"
            )
        self._evict(num_rows, num_pages)
        self._reclaim()

    def _has_room(self, num_rows: int, num_pages: int) -> bool:
        return num_rows <= len(self._free_rows) and num_pages <= self.pages.num_free

    def _reclaim(self) -> None:
        """Find the rows and pages that nobody uses any more."""
        alive, on_host = self.rows["question"] >= 0, self.rows["on_host"]
        self._free_rows = (~alive).nonzero().flatten()
        here, there = alive & ~on_host, alive & on_host
        self.pages.keep_only(self.table[here], self.rows["length"][here])
        if self.plan.num_host_pages:
            self.host_pages.keep_only(self.table[there].cpu(), self.rows["length"][there].cpu())

    def _evict(self, num_rows: int, num_pages: int) -> None:
        """The coldest give up their pages, and their rows too unless the host has room for them."""
        pages_short = num_pages - self.pages.num_free
        if pages_short > 0:
            order = self._coldest_first(on_host=False)
            pages = self.pages.pages_for(self.rows["length"][order])
            enough = int((pages.cumsum(0) < pages_short).sum()) + 1
            enough = max(enough, len(order) // EVICTION_SHARE)
            self._move_to_host(order[:enough])
            left = order[:enough]
            self._drop_rows(left[~self.rows["on_host"][left]])
        rows_short = num_rows - int((self.rows["question"] < 0).sum())
        if rows_short > 0:
            order = self._coldest_first()
            self._drop_rows(order[: max(rows_short, len(order) // EVICTION_SHARE)])

    def _coldest_first(self, *, on_host: bool | None = None) -> Tensor:
        """Rows in the order in which they leave."""
        alive = self.rows["question"] >= 0
        if on_host is not None:
            alive = alive & (self.rows["on_host"] == on_host)
        rows = alive.nonzero().flatten()
        rows = rows[self.rows["serial"][rows].argsort()]
        return rows[self._coldness(rows).argsort(stable=True)]

    def _coldness(self, rows: Tensor) -> Tensor:
        """Smallest leaves first."""
        if self.evict == "oldest":
            return self.rows["serial"][rows]
        # What was never scored is new: it leaves last.
        entropy = self.rows["entropy"][rows]
        return torch.where(entropy.isinf(), torch.inf, -entropy)

    def _move_to_host(self, rows: Tensor) -> None:
        """Move rows, the coldest first, into the host's pages, or of too many the last ones."""
        pages = self.pages.pages_for(self.rows["length"][rows])
        needed = pages.flip(0).cumsum(0).flip(0)  # by each and those after it
        fits = needed <= self.plan.num_host_pages
        rows, needed = rows[fits], needed[fits]
        if len(rows) == 0:
            return
        short = int(needed[0]) - self.host_pages.num_free
        if short > 0:  # the coldest of the host make room
            there = self._coldest_first(on_host=True)
            freed = self.pages.pages_for(self.rows["length"][there]).cumsum(0)
            self._drop_rows(there[: int((freed < short).sum()) + 1])
            self._reclaim()
        lengths = self.rows["length"][rows].long().cpu()
        tokens, logprobs = (values.cpu() for values in self.pages.read(self.table[rows], lengths))
        table = self.host_pages.take(lengths, self.plan.pages_per_trajectory)
        self.host_pages.write(table, Ragged(tokens, lengths), logprobs)
        self.table[rows] = table.to(self.device)
        self.rows["on_host"][rows] = True

    def _drop_rows(self, rows: Tensor) -> None:
        gone = torch.zeros_like(self.rows["success"])
        gone[rows] = True
        self.num_evicted += len(rows)
        self.drop(gone)

    def _trim(self, questions: Tensor) -> None:
        """At most `max_per_question` of each: the coldest leave."""
        assert self.max_per_question is not None
        rows, owner = self.rows_of(questions)
        rank = rank_within(owner, -self._coldness(rows))
        self._drop_rows(rows[rank >= self.max_per_question])

    def _keep_best_groups(self, count: int) -> None:
        """Drop all groups but the `count` of the highest score, the newer one of equals."""
        alive = (self.rows["question"] >= 0).nonzero().flatten()
        group, first = self.rows["group"][alive].unique(return_inverse=True)
        score = torch.zeros(len(group), device=self.device)
        score[first] = self.rows["score"][alive]
        best = score.flip(0).argsort(descending=True, stable=True)[:count]
        kept = torch.zeros(len(group), dtype=torch.bool, device=self.device)
        kept[len(group) - 1 - best] = True
        gone = torch.zeros_like(self.rows["success"])
        gone[alive] = ~kept[first]
        self.drop(gone)

    def _keep_newest(self, count: int) -> None:
        """Drop all but the `count` newest, and what `spare_correct` says (arXiv 2604.08706, "positive
        bias")."""
        alive = (self.rows["question"] >= 0).nonzero().flatten()
        alive = alive[self.rows["serial"][alive].argsort()]
        num_spared = int(self.spare_correct * count)
        older = alive[: max(len(alive) - (count - num_spared), 0)]
        correct = older[self.rows["success"][older]]
        spared = correct[max(len(correct) - num_spared, 0) :]
        self._drop_rows(older[~torch.isin(older, spared)])

    # --- small parts ---

    def _first_copies(self, digests: Tensor) -> Tensor:
        """bool [A]: neither stored already nor earlier in the list."""
        ordered, order = digests.sort(stable=True)
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[1:] = ordered[1:] != ordered[:-1]
        stored = self.rows["digest"]
        place = torch.searchsorted(ordered, stored).clamp(max=len(ordered) - 1)
        known = (ordered[place] == stored) & (self.rows["question"] >= 0)
        hits = torch.zeros(len(ordered), dtype=torch.uint8, device=self.device)
        hits.scatter_reduce_(0, place, known.to(torch.uint8), "amax")
        accepted = torch.empty_like(first)
        accepted[order] = first & (hits == 0)
        return accepted

    def _check(self, new: Experiences) -> None:
        lengths = new.tokens.lengths
        sizes = {len(getattr(new, f.name)) for f in fields(new) if f.name in COLUMNS}
        if sizes != {len(lengths)} or not len(new.tokens.values) == len(new.logprobs):
            raise ValueError("the columns of new experience differ in length")
        if int(lengths.sum()) != len(new.logprobs) or (len(new) and int(lengths.min()) < 1):
            raise ValueError("a trajectory without tokens, or lengths that do not add up")
        if len(new) and int(lengths.max()) > self.plan.max_tokens:
            raise ValueError(
                f"a trajectory of {int(lengths.max())} tokens; the store takes at most "
                f"{self.plan.max_tokens}"
            )
        if not new.question.is_cuda and len(new):  # what lies on a device was in the store before
            low, high = int(new.question.min()), int(new.question.max())
            if low < 0 or high >= self.plan.num_questions:
                raise ValueError(
                    f"question {low if low < 0 else high} is unknown: the store was made for "
                    f"{self.plan.num_questions} questions"
                )
        if not new.logprobs.is_cuda and not bool(new.logprobs.isfinite().all()):
            raise ValueError("a behaviour log-prob is not finite")
        if not new.reward.is_cuda and bool((new.reward + new.entropy).isnan().any()):
            raise ValueError("a reward or an entropy is not a number")

    def check_valid(self) -> None:
        """Assert what must hold between any two calls."""
        owner, on_host = self.rows["question"].long(), self.rows["on_host"]
        alive = owner >= 0
        assert not bool(self.retired[owner[alive]].any()), "a retired question is still stored"
        assert not bool((self.bucket[self.retired] >= 0).any()), "a retired question has a bucket"
        assert int(self.bucket.max()) <= self.group_size
        assert not bool(alive[self._free_rows].any()), "a free row is in use"
        for pages, here in ((self.pages, alive & ~on_host), (self.host_pages, alive & on_host)):
            table, length = self.table[here].cpu(), self.rows["length"][here].cpu()
            columns = torch.arange(table.shape[1])
            used = table[columns < pages.pages_for(length)[:, None]].long()
            assert len(used.unique()) == len(used), "two trajectories share a page"
            assert not torch.isin(pages._free.cpu(), used).any(), "a free page is in use"


# --- what the store is made with ------------------------------------------------------------------


def rank_within(owner: Tensor, keys: Tensor) -> Tensor:
    """int64 [C]: the place of each key among those of its owner, from 0 for the smallest; of equal
    keys the earlier one is smaller."""
    order = keys.argsort(stable=True)
    order = order[owner[order].argsort(stable=True)]
    ordered = owner[order].contiguous()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - torch.searchsorted(
        ordered, ordered
    )
    return rank


def token_digests(tokens: Ragged) -> Tensor:
    """int64 [A]: a hash of each sequence, by its tokens, their places and its length.

    A sum of scrambled (token, place) pairs: integers, so the order of adding does not matter.
    """
    device = tokens.values.device
    owner, place = places(tokens.lengths, device)
    pairs = scramble(place.bitwise_left_shift_(32).add_(tokens.values))
    lengths = tokens.lengths.to(device, non_blocking=True)
    return scramble(lengths).index_add_(0, owner, pairs)


def scramble(values: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014, section 5) on int64, wrapping around."""
    mixed = values + -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed.bitwise_xor_(_shift_right(mixed, shift)).mul_(factor)
    return mixed.bitwise_xor_(_shift_right(mixed, 31))


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Logical, not arithmetic."""
    return (values >> bits).bitwise_and_((1 << (64 - bits)) - 1)
