"""How large the experience store is, worked out before anything is loaded, torch included."""

from __future__ import annotations

from dataclasses import dataclass

# A page this size wastes half of itself a trajectory; a table entry costs 4 bytes a page.
MAX_PAGE_TOKENS = 256
PAGES_PER_LONGEST = 8


class StoreTooSmall(ValueError):
    """The budget does not hold what one step may bring."""


@dataclass(frozen=True)
class StorePlan:
    """Sizes of an `ExperienceStore`: questions of the data, rows for trajectories, token pages."""

    num_questions: int
    num_trajectories: int
    num_pages: int
    page_tokens: int
    max_tokens: int  # of one trajectory
    logprob_bytes: int = 4  # of one log-prob: 4 = float32, 2 = bfloat16
    num_host_pages: int = 0  # where cold trajectories go instead of leaving

    @property
    def pages_per_trajectory(self) -> int:
        """Of the longest one: the width of the page table."""
        return -(-self.max_tokens // self.page_tokens)

    @property
    def page_bytes(self) -> int:
        return self.page_tokens * (4 + self.logprob_bytes)

    @property
    def row_bytes(self) -> int:
        """Columns of one trajectory: three of 8 bytes, seven of 4, three flags, its page table."""
        return 3 * 8 + 7 * 4 + 3 + 4 * self.pages_per_trajectory

    @property
    def question_bytes(self) -> int:
        return 2 * 2 + 2 * 4 + 1

    @property
    def num_bytes(self) -> int:
        """On the training device, the lists of free rows and pages included."""
        return (
            self.num_questions * self.question_bytes
            + self.num_trajectories * (self.row_bytes + 8)
            + self.num_pages * (self.page_bytes + 4)
        )

    @property
    def num_host_bytes(self) -> int:
        return self.num_host_pages * (self.page_bytes + 4)

    @staticmethod
    def fit(
        *,
        num_questions: int,
        trajectories_per_step: int,
        num_steps: int,
        max_tokens: int,
        max_bytes: int,
        host_bytes: int = 0,
        page_tokens: int | None = None,
        logprob_bytes: int = 4,
    ) -> StorePlan:
        """Room for everything a run can bring, or as much of it as `max_bytes` hold.

        StoreTooSmall when they do not hold the trajectories of one step at their longest.
        """
        if page_tokens is None:
            wanted = -(-max_tokens // PAGES_PER_LONGEST)
            page_tokens = min(MAX_PAGE_TOKENS, 1 << max(4, (wanted - 1).bit_length()))

        def plan(rows: int, pages: int) -> StorePlan:
            return StorePlan(
                num_questions, rows, pages, page_tokens, max_tokens, logprob_bytes, host_pages
            )

        host_pages = 0
        width = plan(0, 0).pages_per_trajectory
        least = plan(trajectories_per_step, trajectories_per_step * width)
        if least.num_bytes > max_bytes:
            raise StoreTooSmall(
                f"one step may bring {trajectories_per_step} trajectories of {max_tokens} tokens, "
                f"{least.num_bytes / 2**30:.3g} GiB; {max_bytes / 2**30:.3g} GiB do not hold them"
            )
        host_pages = host_bytes // (least.page_bytes + 4)
        rows = trajectories_per_step * num_steps
        everything = plan(rows, rows * width)
        if everything.num_bytes <= max_bytes:
            return plan(rows, rows * width)
        # A trajectory takes at least one page, so more rows than pages are of no use; and rows must
        # leave room for the pages of one step.
        room = max_bytes - num_questions * least.question_bytes
        row_bytes, page_bytes = least.row_bytes + 8, least.page_bytes + 4
        rows = min(
            rows,
            room // (row_bytes + page_bytes),
            (room - least.num_pages * page_bytes) // row_bytes,
        )
        return plan(rows, (room - rows * row_bytes) // page_bytes)
