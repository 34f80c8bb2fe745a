"""GSM8K: rows, prompts, and what an answer is worth."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from shared.errors import ConfigError

INSTRUCTION = 'End with "#### " and the number.'
# A minus counts as a sign only where nothing stands before it that it could be subtracted from: 10-3 ends in 3.
_NUMBER = re.compile(r"(?:(?<![0-9A-Za-z.)])-)?[0-9][0-9,]*(?:\.[0-9]+)?")


class Row(BaseModel):
    """`answer` ends with `#### NUMBER`. Other columns are ignored."""

    model_config = ConfigDict(frozen=True)

    question: str
    answer: str

    @property
    def target(self) -> Decimal:
        """The number after `####`. Raises: ConfigError: there is none."""
        number = final_number(self.answer.rpartition("####")[2]) if "####" in self.answer else None
        if number is None:
            raise ConfigError(f"an answer has no number after '####': {self.answer[-80:]!r}")
        return number


def read_rows(file: Path) -> list[Row]:
    """One JSON object a line. Raises: ConfigError naming the line that is none, or has no final number."""
    rows = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(Row.model_validate_json(line))
                _ = rows[-1].target
            except (ValidationError, ConfigError) as error:
                raise ConfigError(f"{file}, line {number}: {error}") from error
    return rows


def prompt_tokens(question: str, tokenizer: Any) -> list[int]:
    """With the tokenizer's chat template, if it has one."""
    text = f"{question}\n{INSTRUCTION}"
    if tokenizer.chat_template is None:
        return list(tokenizer(f"Question: {text}\nAnswer:")["input_ids"])
    messages = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def final_number(text: str) -> Decimal | None:
    """The last number in `text`, None if there is none; `1,200.50` is read as 1200.5."""
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def reward(text: str, row: Row) -> float:
    """1.0 if the last number in `text` is the row's, else 0.0."""
    return float(final_number(text) == row.target)


def advantages(rewards: Sequence[float]) -> list[float]:
    """GRPO: rewards of one prompt's answers, less their mean, over their standard deviation; zeros if all are equal."""
    mean, deviation = statistics.fmean(rewards), statistics.pstdev(rewards)
    return [(value - mean) / (deviation + 1e-6) for value in rewards]
