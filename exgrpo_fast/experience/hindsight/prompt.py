"""The prompt under which a policy revises its own failed completion.

It shows the task, the earlier solution, and which requirements that met and missed, in their public
words. It never shows the reference answer, and it is never cut: one that is too long is no prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exgrpo_fast.core.types import Question, Verdict

ANSWER = "The final answer is right."


def hindsight_text(task: str, draft: str, met: Sequence[str], missed: Sequence[str]) -> str:
    """The user message."""
    parts = [task, "Your earlier solution:", draft]
    if met:
        parts.append("What it met:\n" + "\n".join(f"- {text}" for text in met))
    parts.append("What it missed:\n" + "\n".join(f"- {text}" for text in missed))
    parts.append(
        "Find the mistake, keep what is right, and write one complete new solution. "
        "Do not speak of the earlier one."
    )
    return "\n".join(parts)


@dataclass(frozen=True)
class HindsightPrompt:
    """Question, draft and verdict -> the question as it is asked for a revision.

    `public_texts`: the words of each rubric, known once a worker has loaded them; without any, the
    answer alone is spoken of.
    """

    tokenizer: Any
    public_texts: Callable[[], Mapping[str, str]]
    max_prompt_tokens: int

    def ask(
        self, question: Question, draft: str, verdict: Verdict, *, revision: int
    ) -> Question | None:
        """None when the prompt would be longer than allowed."""
        conversation = list(question.conversation)
        task = conversation[-1]["content"]
        text = hindsight_text(task, draft, *self._met_and_missed(verdict))
        conversation[-1] = {"role": "user", "content": text}
        prompt, ids = self._render(conversation)
        if len(ids) > self.max_prompt_tokens:
            return None
        return Question(
            id=f"{question.id}/revision{revision}",
            prompt_ids=tuple(ids),
            prompt=prompt,
            answer=question.answer,
            columns=question.columns,
            conversation=question.conversation,
        )

    def _met_and_missed(self, verdict: Verdict) -> tuple[list[str], list[str]]:
        texts = self.public_texts()
        checks = [(texts.get(name, name), met) for name, met in verdict.checks]
        checks = checks or [(ANSWER, verdict.successful)]
        return [text for text, met in checks if met], [text for text, met in checks if not met]

    def _render(self, conversation: Sequence[Mapping[str, Any]]) -> tuple[str, list[int]]:
        if getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True
            )
            return text, self.tokenizer(text, add_special_tokens=False)["input_ids"]
        text = "\n\n".join(message["content"] for message in conversation)
        return text, self.tokenizer(text)["input_ids"]
