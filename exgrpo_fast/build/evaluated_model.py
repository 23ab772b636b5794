"""A model outside a training run: what `exgrpo-fast eval` and `sample` generate and score with."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from exgrpo_fast.build.assembly import make_evaluator
from exgrpo_fast.build.data import read_questions
from exgrpo_fast.build.engines import build_engine, make_endpoint_engine, reserve_engine
from exgrpo_fast.build.environment import prepare_process
from exgrpo_fast.build.experience import make_hindsight_prompt
from exgrpo_fast.build.folder import check_folder, completion_room, refuse_too_long
from exgrpo_fast.build.forward import prove_forward
from exgrpo_fast.build.models import make_policy
from exgrpo_fast.build.pretrained import model_folder
from exgrpo_fast.build.rewards import check_rewards, make_rewards
from exgrpo_fast.config import Config
from exgrpo_fast.core.types import Question
from exgrpo_fast.data import question_from_text
from exgrpo_fast.experience.scoring import Verifier
from exgrpo_fast.model.folder_reading import load_tokenizer, make_decode
from exgrpo_fast.rewards import RewardPool
from exgrpo_fast.rollout.engine import RolloutEngine
from exgrpo_fast.run.display.live import make_screen
from exgrpo_fast.training.evaluate import Evaluator


class EvaluatedModel:
    """`model.name` of a config; the weights are loaded when an evaluator is asked for."""

    def __init__(
        self,
        config: Config,
        *,
        device: str,
        endpoint: Mapping[str, Any] | None = None,
        shorten: bool = False,
        rewards: RewardPool | None = None,
    ) -> None:
        """`endpoint`: url, model and key_env of a vLLM server that generates; then no weights are
        loaded here; `shorten`: completions to what the model has positions for; `rewards`: workers
        that run already and were tried on a row."""
        prepare_process(device)
        self.config = config
        self.device = device
        self.endpoint = endpoint
        self._notes: list[str] = []  # on the data; said when nothing more can be wrong with them
        self.screen = make_screen(sys.stderr)  # stdout is for the results alone
        self.name = model_folder(config.model.name or "", self.screen)
        self.tokenizer = load_tokenizer(self.name)
        self.shorten = shorten
        self.rewards = rewards
        self.longest_prompt = 0
        if endpoint is None:
            self._notes += check_folder(config, self.name, self.tokenizer)

    def read(self, source: str) -> Sequence[Question]:
        found = read_questions(self.config, source, self.tokenizer, self._notes.append).questions
        self._fit([len(question.prompt_ids) for question in found])
        return found

    def question(self, text: str) -> Question:
        system_prompt = self.config.data.system_prompt
        question = question_from_text(text, tokenizer=self.tokenizer, system_prompt=system_prompt)
        self._fit([len(question.prompt_ids)])
        return question

    def _fit(self, prompt_lengths: Sequence[int]) -> None:
        """ConfigError where completions do not fit behind the longest prompt, or shorten them."""
        if self.endpoint is not None:
            return
        self.longest_prompt = max([self.longest_prompt, *prompt_lengths])
        if self.shorten:
            room = completion_room(self.config, self.name, longest_prompt=self.longest_prompt)
            rollout = self.config.rollout.model_copy(update={"max_completion_tokens": room})
            self.config = self.config.model_copy(update={"rollout": rollout})
        refuse_too_long(self.config, self.name, longest_prompt=self.longest_prompt)

    @contextlib.contextmanager
    def evaluator(self, question: Question, *, revisions: int = 0) -> Iterator[Evaluator]:
        """`question`: any of those that will be asked; `revisions`: rounds in which failed
        completions are revised. RewardError for a reward that fails on the question's row."""
        config, tokenizer, screen = self.config, self.tokenizer, self.screen
        try:
            with (
                self.rewards or make_rewards(config) as rewards,
                contextlib.ExitStack() as stack,
            ):
                if question.answer and self.rewards is None:  # one typed by hand has no answer
                    check_rewards(config, rewards, question)
                for note in self._notes:
                    screen.note(note)
                engine = self._engine(question.prompt_ids, stack)
                verifier = Verifier(rewards, make_decode(tokenizer), screen)
                prompt = make_hindsight_prompt(config, rewards, tokenizer) if revisions else None
                yield make_evaluator(
                    config, engine, verifier, screen, prompt=prompt, revisions=revisions
                )
        finally:
            screen.close()

    def _engine(self, prompt_ids: Sequence[int], stack: contextlib.ExitStack) -> RolloutEngine:
        if self.endpoint is not None:
            return make_endpoint_engine(self.name, self.tokenizer, **self.endpoint)
        config, name, device = self.config, self.name, self.device
        reserved = stack.enter_context(reserve_engine(config, name, self.tokenizer, device=device))
        policy = make_policy(config, name, device=device)
        engine = build_engine(config, policy, self.tokenizer, reserved, prompt_ids=prompt_ids)
        option = "--allow-mismatch"
        found = prove_forward(config, policy, engine, self.tokenizer, prompt_ids, option=option)
        self.screen.note(found)
        return engine
