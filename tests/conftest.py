"""Two depths of search: the default, and --deep for twenty times as many cases."""

from hypothesis import HealthCheck, settings

_COMMON = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("quick", max_examples=25, **_COMMON)
settings.register_profile("deep", max_examples=500, **_COMMON)


def pytest_addoption(parser):
    parser.addoption("--deep", action="store_true", help="try 500 cases of each law, not 25")


def pytest_configure(config):
    settings.load_profile("deep" if config.getoption("--deep") else "quick")
