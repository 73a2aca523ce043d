"""Claims of the methods in danlu.nn."""

__all__: list[str] = []
