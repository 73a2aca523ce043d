"""Claims of the methods in danlu.objectives."""

__all__: list[str] = []
