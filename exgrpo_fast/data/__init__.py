"""Rows of a dataset -> Questions. A malformed row is named and skipped, never a traceback.

Three stages, each usable alone:

    read_rows       source -> Row | BadRow, as the file has them (JSON Lines, JSON, Parquet, a
                    dataset of the Hugging Face hub, or a reasoning-gym task)
    check_data      + the fields, the answers and the ids; needs no tokenizer
    load_questions  + the chat template and the token ids

Whether a gold answer can be verified is not decided here: see `rewards.check_golds`. Importing this
package loads no torch; check-data and the rewards do without.
"""

from exgrpo_fast.data.checking import (
    CheckedRow,
    DataReport,
    as_answer,
    check_data,
    check_first_rows,
    content_id,
)
from exgrpo_fast.data.parsing import parse_row
from exgrpo_fast.data.questions import (
    LoadedQuestions,
    load_questions,
    make_questions,
    question_from_text,
)
from exgrpo_fast.data.sources import BadRow, DataError, Row, Source, names_file, read_rows

__all__ = [
    "BadRow",
    "CheckedRow",
    "DataError",
    "DataReport",
    "LoadedQuestions",
    "Row",
    "Source",
    "as_answer",
    "check_data",
    "check_first_rows",
    "content_id",
    "load_questions",
    "make_questions",
    "names_file",
    "parse_row",
    "question_from_text",
    "read_rows",
]
