"""Options and surroundings of all tests: offline, quiet, and nothing of the user's own settings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
for _name in [
    name for name in os.environ if name.startswith("MEDGPT_") and not name.startswith("MEDGPT_TEST_")
]:
    del os.environ[_name]

DATA = Path(__file__).parent / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--medgpt-data", metavar="DIR", help="the full data sets, for the slow tests")
    parser.addoption(
        "--medgpt-model", metavar="DIR", help="a real model (`medgpt pull smollm2-135m` prints where)"
    )
    parser.addoption(
        "--medgpt-templates", metavar="DIR", help="published chat templates (*.jinja), for a slow test"
    )


@pytest.fixture(scope="session")
def full_data(request: pytest.FixtureRequest) -> Path:
    """The folder of full data sets; the test is skipped where it was not given."""
    given = request.config.getoption("--medgpt-data")
    if not given:
        pytest.skip("needs --medgpt-data DIR with the full data sets (docs/testing.md)")
    return Path(given).resolve()


@pytest.fixture(scope="session")
def real_model(request: pytest.FixtureRequest) -> Path:
    """The folder of SmolLM2-135M-Instruct; the test is skipped where it was not given."""
    given = request.config.getoption("--medgpt-model")
    if not given:
        pytest.skip("needs --medgpt-model DIR with SmolLM2-135M-Instruct (docs/testing.md)")
    return Path(given).resolve()
