"""Claims of the methods in danlu.linalg."""

__all__: list[str] = []
