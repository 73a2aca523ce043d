"""Claims of the methods in danlu.distributions."""

__all__: list[str] = []
