"""Settings of the whole suite. The fixtures are in `model_fixtures`, which the process that hands out tests omits."""

import gc
import os

import pytest

if gc.isenabled():  # imports and tests are half a million objects that stay: looking through them takes seconds
    gc.disable()
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may download


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures where tests run. Their libraries take seconds, for which the workers would have to wait."""
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("model_fixtures")


def pytest_collection_finish() -> None:
    """Start the collector of garbage, which leaves alone what is there by now."""
    gc.freeze()
    gc.enable()
