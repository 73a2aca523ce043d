"""``danlu verify``: the methods' claims, measured again; its options are those of :mod:`danlu.claims`."""

import argparse


def run(arguments: argparse.Namespace) -> int:
    """Measure claims again."""
    from danlu.claims import main

    return main(arguments.words)
