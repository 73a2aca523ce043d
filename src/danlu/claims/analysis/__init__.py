"""Claims of the methods in danlu.analysis."""

__all__: list[str] = []
