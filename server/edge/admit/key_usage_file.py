"""What keys used on each of the last days, in a file: a restart gives nobody his day's quota anew.

Written every few seconds by one process, and by any that is asked for a report; a lock of the
kernel's has them take turns. What was counted after the last writing before a kill is lost, and
nothing at an orderly end.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.edge.admit.key_usage import DAY_S, DayUsage, SharedUsage, day_of

DAYS_KEPT: Final = 31
USAGE_FILE: Final = "key-usage.json"

logger = logging.getLogger(__name__)


class DayRow(BaseModel):
    """One key on one day."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests: int = Field(ge=0)
    prompt_tokens: int = Field(ge=0)
    generated_tokens: int = Field(ge=0)
    quota_tokens: int = Field(default=0, ge=0)

    @property
    def usage(self) -> DayUsage:
        return DayUsage(self.requests, self.prompt_tokens, self.generated_tokens)

    def usage_numbers(self) -> dict[str, int]:
        """For a report: without what only the quota counts."""
        return self.model_dump(exclude={"quota_tokens"})


class UsageDays(BaseModel):
    """The file: by date, by the name of the key."""

    model_config = ConfigDict(extra="forbid")

    days: dict[str, dict[str, DayRow]] = {}


class KeyUsageFile:
    """See the module.

    Args:
        path: The file.
        shared: Where the counts are.
    """

    def __init__(self, path: Path, shared: SharedUsage) -> None:
        self.path = path
        self.shared = shared

    def read(self) -> UsageDays:
        """What was written; a file that cannot be read is put aside, and the log says so."""
        try:
            return UsageDays.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return UsageDays()
        except (OSError, ValidationError) as error:
            aside = self.path.with_suffix(".broken")
            logger.error(
                "%s cannot be used and is put aside as %s; quotas of this day begin anew: %s",
                self.path, aside.name, " ".join(str(error).split())[:200],
            )  # fmt: skip
            try:
                os.replace(self.path, aside)
            except OSError as again:
                logger.error("%s cannot be put aside: %s", self.path, again.strerror)
            return UsageDays()

    def restore(self) -> None:
        """Take the counts of today over, before anything is counted."""
        for name, row in self.read().days.get(_today(), {}).items():
            self.shared.restore(name, row.usage, row.quota_tokens)

    def write(self, names: Iterable[str]) -> None:
        """Write the counts of these keys.

        Raises:
            OSError: They could not be written.
        """
        with self._turn():  # from reading on: what another adds meanwhile would be lost
            self._write(names)

    def _write(self, names: Iterable[str]) -> None:
        found = self.read()
        before = day_of(int(time.time() // DAY_S) - 1)
        for name in names:
            used = self.shared.of(name)
            for day, one, tokens in (
                (before, used.last_day, 0),
                (_today(), used.day, used.day_tokens),
            ):
                # The day before is known here only if something was counted since the start.
                if one != DayUsage():
                    found.days.setdefault(day, {})[name] = DayRow(
                        requests=one.requests,
                        prompt_tokens=one.prompt_tokens,
                        generated_tokens=one.generated_tokens,
                        quota_tokens=max(0, tokens),
                    )
        kept = sorted(found.days)[-DAYS_KEPT:]
        draft = self.path.with_suffix(".draft")
        draft.write_text(
            json.dumps(UsageDays(days={day: found.days[day] for day in kept}).model_dump()),
            encoding="utf-8",
        )
        os.replace(draft, self.path)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """No other thread or process writes meanwhile."""
        lock = self.path.with_suffix(".lock")
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # a child forked meanwhile has the handle too
            os.close(handle)


def _today() -> str:
    return day_of(int(time.time() // DAY_S))
