"""Claims of the methods in danlu.diffusion."""

__all__: list[str] = []
