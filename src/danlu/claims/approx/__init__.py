"""Claims of the methods in danlu.approx."""

__all__: list[str] = []
