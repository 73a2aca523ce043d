"""The words of a command line whose options are those of a configuration, sorted before they are parsed."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

__all__ = ["Words", "sort_words"]

_LISTS = ("--data.path",)


class Words(NamedTuple):
    """The words of a command line: for the command itself, for the configuration, and the first word or None."""

    own: list[str]
    options: list[str]
    first: str | None


def sort_words(
    words: Sequence[str],
    own_options: Mapping[str, int | None],
    command: str,
    *,
    stray: Callable[[str], bool] = lambda word: False,
    what: str = "run",
) -> Words:
    """Sort the words of the command line.

    Args:
        words: those after the command.
        own_options: options of the command itself, with the number of words each takes (None: all that follow).
        command: its name.
        stray: whether a word that follows an option and its value may be the first word.
        what: the command takes one of.

    Raises:
        ValueError: two first words, or an option with a single hyphen.
    """
    from danlu.cli.overrides import is_option

    own, options, firsts = list[str](), list[str](), list[str]()
    name, more = "", 0.0  # the option before, and how many words it may still take
    for word in words:
        if is_option(word):
            name, equals, _ = word.partition("=")
            if not word.startswith("--") and word != "-h":
                raise ValueError(f"danlu {command} has no option {name} (see danlu {command} --help)")
            taken = own_options.get(name)
            more = 0 if equals else float("inf") if taken is None else taken
            (own if name in own_options else options).append(word)
        elif more <= 0:
            firsts.append(word)
        elif name in own_options:
            own.append(word)
            more -= 1
        elif more < float("inf") and name not in _LISTS and stray(word):
            # The option before has its value, so that this word is one too many.
            firsts.append(word)
        else:
            options.append(word)
            more = 1e9
    if len(firsts) > 1:
        raise ValueError(
            f"danlu {command} takes one {what}, got {' and '.join(map(repr, firsts))}; data are given by --data"
        )
    return Words(own, options, firsts[0] if firsts else None)
