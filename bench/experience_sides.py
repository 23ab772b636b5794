"""The two sides of `bench/experience.py`: the experience store and dicts of lists, and their work."""

import argparse
import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from inputs import DTYPES
from torch import Tensor

from exgrpo_fast.experience.replay.plan import StorePlan
from exgrpo_fast.experience.replay.selectors import (
    allocate,
    bucket_probabilities,
    choose,
    gaussian_buckets,
)
from exgrpo_fast.experience.replay.store import Experiences, ExperienceStore
from exgrpo_fast.model.attention.layout import AttentionLayout
from exgrpo_fast.model.packing import Pack, Ragged, pack

GROUP_SIZE, MEAN, SIGMA = 8, 0.5, 0.125
PER_STEP, COPIES = 1024, 32
RICH, EVERY = 16, 9  # every ninth question has 16 trajectories
ASKED, VISITED, SOLVED = 64, 128, 16
PACK_TOKENS, PAGE_TOKENS = 32768, 256


# ---- what the steps bring ------------------------------------------------------------------------


class Step(NamedTuple):
    """Trajectories as a trainer has them: one tensor each, on the CPU."""

    questions: list[int]
    tokens: list[Tensor]
    logprobs: list[Tensor]


class Workload:
    """The same trajectories each time: question after question, a step's worth at a time."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        questions, trajectories = arguments.questions, arguments.trajectories
        generator = torch.Generator().manual_seed(arguments.seed)
        counts = torch.full((questions,), RICH)
        others = (torch.arange(questions) % EVERY != 0).nonzero().flatten()
        left = trajectories - RICH * (questions - len(others))
        if left < len(others):
            raise SystemExit(f"{trajectories} trajectories are too few for {questions} questions")
        counts[others] = left // len(others)
        counts[others[: left % len(others)]] += 1
        self.questions = torch.arange(questions).repeat_interleave(counts)
        spread, mean = 0.6, math.log(arguments.tokens) - 0.6**2 / 2
        lengths = torch.exp(spread * torch.randn(trajectories, generator=generator) + mean)
        self.lengths = lengths.long().clamp(16, arguments.max_tokens)
        self.buckets = torch.randint(1, GROUP_SIZE, (questions,), generator=generator)
        prompts = torch.randint(50, 250, (questions,), generator=generator)
        words = torch.randint(150_000, (int(prompts.sum()),), generator=generator)
        self.prompts = Ragged(words, prompts)
        self.made: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self.max_tokens = arguments.max_tokens
        self.logprob_dtype = DTYPES[arguments.logprob_dtype]

    @property
    def num_steps(self) -> int:
        return -(-len(self.questions) // (PER_STEP - COPIES))

    def numbers(self, step: int) -> Tensor:
        """Which trajectories a step brings, the copies last."""
        fresh = torch.arange(len(self.questions)).split(PER_STEP - COPIES)
        return torch.cat(
            [fresh[step], *(fresh[max(i, 0)][: COPIES // 2] for i in (step, step - 1))]
        )

    def step(self, step: int) -> Step:
        fresh, before = self._fresh(step), self._fresh(max(step - 1, 0))
        tokens, logprobs = (
            [*a, *a[: COPIES // 2], *b[: COPIES // 2]] for a, b in zip(fresh, before, strict=True)
        )
        return Step(self.questions[self.numbers(step)].tolist(), tokens, logprobs)

    def _fresh(self, step: int) -> tuple[list[Tensor], list[Tensor]]:
        """Tokens and log-probs of those that are no copies; this step's and the last are kept."""
        if step not in self.made:
            lengths = self.lengths.split(PER_STEP - COPIES)[step]
            generator, count = torch.Generator().manual_seed(step), int(lengths.sum())
            tokens = torch.randint(150_000, (count,), generator=generator)
            values = -torch.rand(count, generator=generator).to(self.logprob_dtype).float()
            sizes = lengths.tolist()
            self.made = {
                **{k: v for k, v in self.made.items() if k == step - 1},
                step: (list(tokens.split(sizes)), list(values.split(sizes))),
            }
        return self.made[step]

    def forget(self) -> None:
        """Hold nothing that a store could share or be blamed for."""
        self.made = {}

    def stored_after(self, step: int) -> int:
        """Questions that have a trajectory by then."""
        last = min((step + 1) * (PER_STEP - COPIES), len(self.questions)) - 1
        return int(self.questions[last]) + 1

    def plan(self) -> StorePlan:
        """Room for all that comes, copies included: no step has to wait until room is made."""
        numbers = torch.cat([self.numbers(i) for i in range(self.num_steps)])
        pages = (self.lengths[numbers] + PAGE_TOKENS - 1) // PAGE_TOKENS
        return StorePlan(
            num_questions=len(self.buckets),
            num_trajectories=len(numbers),
            num_pages=int(pages.sum()),
            page_tokens=PAGE_TOKENS,
            max_tokens=self.max_tokens,
            logprob_bytes=self.logprob_dtype.itemsize,
        )


# ---- the two stores ------------------------------------------------------------------------------


class Ours:
    """The calls of `ReplaySource` on the experience store."""

    def __init__(self, plan: StorePlan, device: str) -> None:
        self.store = ExperienceStore(plan, group_size=GROUP_SIZE, device=device)
        self.selector = gaussian_buckets(mean=MEAN, sigma=SIGMA)

    def add(self, step: Step) -> None:
        count = len(step.questions)
        self.store.add(
            Experiences(
                question=torch.tensor(step.questions),
                tokens=Ragged.of(step.tokens),
                logprobs=torch.cat(step.logprobs),
                birth_step=torch.zeros(count, dtype=torch.int64),
                reward=torch.ones(count),
                success=torch.ones(count, dtype=torch.bool),
                truncated=torch.zeros(count, dtype=torch.bool),
                entropy=torch.ones(count),
                group=torch.zeros(count, dtype=torch.int64),
                score=torch.zeros(count),
                advantage=torch.zeros(count),
            )
        )

    def move(self, questions: Sequence[int], buckets: Sequence[int]) -> None:
        self.store.move(torch.tensor(questions), torch.tensor(buckets))

    def draw(self, rng: np.random.Generator) -> list[int]:
        return self.selector(self.store, ASKED, rng, 0)

    def rows(self, asked: Sequence[int]) -> Tensor:
        return self.store.rows_of(torch.tensor(asked, device=self.store.device))[0]

    def gather(self, rows: Tensor, prompts: Ragged) -> tuple[list[Pack], Tensor]:
        found = self.store.read(rows)
        asked = prompts.pick(found.question.cpu())
        packs = pack(asked, found.tokens, max_tokens=PACK_TOKENS, device=self.store.device)
        return packs, found.logprobs

    def choose(self, keys: Tensor) -> list[int]:
        owner = torch.arange(ASKED, device=keys.device).repeat_interleave(RICH)
        return choose(owner, keys, 1).tolist()

    def update(self, visited: Sequence[int], buckets: Sequence[int]) -> None:
        self.store.retire(torch.tensor(visited[:SOLVED]))
        self.store.visit(torch.tensor(visited), torch.tensor(buckets), step=1)
        self.move(visited[SOLVED:], buckets[SOLVED:])


class Plain:
    """Dicts of lists, one trajectory at a time; what is gathered goes to the device at the end."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.experience: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.members: dict[int, list[int]] = {k: [] for k in range(GROUP_SIZE + 1)}
        self.bucket: dict[int, int] = {}
        self.visits: dict[int, int] = {}
        self.retired: set[int] = set()

    def add(self, step: Step) -> None:
        for question, tokens, logprobs in zip(*step, strict=True):
            if question in self.retired:
                continue
            kept = self.experience.setdefault(question, [])
            if not any(torch.equal(tokens, known) for known, _ in kept):
                kept.append((tokens.clone(), logprobs.clone()))

    def move(self, questions: Sequence[int], buckets: Sequence[int]) -> None:
        for question, bucket in zip(questions, buckets, strict=True):
            if self.bucket.get(question) != bucket:
                self._leave_bucket(question)
                self.members[bucket].append(question)
                self.bucket[question] = bucket

    def draw(self, rng: np.random.Generator, *, scan: bool = False) -> list[int]:
        valid = [question for question in self.experience if question not in self.retired]
        known: Collection[int] = valid if scan else set(valid)
        found = {k: [q for q in of_bucket if q in known] for k, of_bucket in self.members.items()}
        sizes = {k: len(of_bucket) for k, of_bucket in found.items()}
        shares = allocate(
            min(ASKED, len(valid)),
            bucket_probabilities(sizes, group_size=GROUP_SIZE, mean=MEAN, sigma=SIGMA),
            sizes,
            rng,
        )
        return [
            found[k][place]
            for k, count in shares.items()
            if count
            for place in rng.choice(sizes[k], size=count, replace=False)
        ]

    def rows(self, asked: Sequence[int]) -> list[tuple[int, Tensor, Tensor]]:
        return [(question, *kept) for question in asked for kept in self.experience[question]]

    def gather(
        self, rows: list[tuple[int, Tensor, Tensor]], prompts: list[Tensor]
    ) -> tuple[list[Pack], Tensor]:
        sizes = [len(prompts[question]) + len(tokens) - 1 for question, tokens, _ in rows]
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)  # rows of the same prompt
        for i, (question, _, _) in enumerate(rows):
            alike[tuple(prompts[question].tolist())].append(i)
        packs: list[list[list[int]]] = []  # of each, the rows behind each of its prompts
        used = 0
        for members in sorted(alike.values(), key=lambda of_one: -max(sizes[i] for i in of_one)):
            is_read = False
            for i in sorted(members, key=lambda i: -sizes[i]):
                added = len(rows[i][1]) - 1 if is_read else sizes[i]
                if not packs or used + added > PACK_TOKENS:
                    packs.append([])
                    used, added, is_read = 0, sizes[i], False
                if not is_read:
                    packs[-1].append([])
                packs[-1][-1].append(i)
                used, is_read = used + added, True
        joined = [self._join(rows, prompts, groups) for groups in packs]
        return joined, torch.cat([logprobs for _, _, logprobs in rows]).to(self.device)

    def _join(
        self, rows: list[tuple[int, Tensor, Tensor]], prompts: list[Tensor], groups: list[list[int]]
    ) -> Pack:
        read, positions, places, end = [], [], [], 0
        for members in groups:
            prompt = prompts[rows[members[0]][0]]
            read.append(prompt)
            positions.append(torch.arange(len(prompt)))
            last = end + len(prompt) - 1
            end += len(prompt)
            for i in members:
                tokens = rows[i][1]
                read.append(tokens[:-1])
                positions.append(torch.arange(len(prompt), len(prompt) + len(tokens) - 1))
                places += [torch.tensor([last]), torch.arange(end, end + len(tokens) - 1)]
                end += len(tokens) - 1
        index = [i for members in groups for i in members]
        targets = [rows[i][1] for i in index]
        return Pack(
            input_ids=torch.cat(read).to(self.device),
            position_ids=torch.cat(positions).to(self.device),
            layout=AttentionLayout(
                torch.tensor([len(prompts[rows[members[0]][0]]) for members in groups]),
                torch.tensor([len(target) - 1 for target in targets]),
                torch.tensor([g for g, members in enumerate(groups) for _ in members]),
            ),
            rows=torch.cat(places).to(self.device),
            targets=torch.cat(targets).to(self.device),
            lengths=tuple(len(target) for target in targets),
            index=tuple(index),
        )

    def choose(self, keys: Tensor) -> list[int]:
        values = keys.tolist()
        places = [range(start, start + RICH) for start in range(0, len(values), RICH)]
        return [min(of_one, key=values.__getitem__) for of_one in places]

    def update(self, visited: Sequence[int], buckets: Sequence[int]) -> None:
        for question in visited[:SOLVED]:
            self.retired.add(question)
            self.experience.pop(question, None)
            self._leave_bucket(question)
        for question in visited:
            self.visits[question] = self.visits.get(question, 0) + 1
        self.move(visited[SOLVED:], buckets[SOLVED:])

    def _leave_bucket(self, question: int) -> None:
        if question in self.bucket:
            self.members[self.bucket.pop(question)].remove(question)
