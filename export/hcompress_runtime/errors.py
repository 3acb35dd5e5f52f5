"""The part of the exception tree that a serving box needs; `hcompress.errors` completes and draws it."""

from __future__ import annotations


class HcompressError(Exception):
    """A failure whose message tells the user what to do. Exit code 1 on the command line."""


class BundleError(HcompressError):
    """A bundle is truncated, tampered with, or of an unknown format."""


class DiskError(HcompressError):
    """The disk refuses a file; what was there before is untouched."""


class EngineError(HcompressError):
    """A library, driver or GPU that engines need is absent or does not fit; the line is `problem; fix`."""

    def __init__(self, problem: str, fix: str | None = None) -> None:
        super().__init__("; ".join(filter(None, (problem, fix))))
        self.problem, self.fix = problem, fix


class InputError(HcompressError):
    """Labels, prompts, seeds or sizes that this model cannot take."""


class MissingExtra(HcompressError):
    """An optional library is not installed; the message holds the pip command."""


def missing(library: str, extra: str) -> MissingExtra:
    """The error for an absent optional `library`, which the extra `extra` brings."""
    return MissingExtra(f"{library} is not installed; pip install 'hcompress[{extra}]'")
