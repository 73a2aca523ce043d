"""Claims of the methods in danlu.optim."""

__all__: list[str] = []
