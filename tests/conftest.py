"""One thread a test process (two OpenMP pools on one core wait on each other) and one Hypothesis profile."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import HealthCheck, settings

settings.register_profile(
    "danlu", max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("many", settings.get_profile("danlu"), max_examples=170, derandomize=False)
settings.load_profile("danlu")
