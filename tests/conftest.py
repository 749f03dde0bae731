"""What all tests share."""

from hypothesis import HealthCheck, settings

# Two busy cores: time is no measure of a strategy here.
settings.register_profile("leanscope", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("leanscope")
