"""Back ends as a fixture, fresh printed seeds, and memory that is NaN until somebody writes it."""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, settings

import yoco_ext.reference
from yoco_ext import _library

settings.register_profile(
    "yoco",
    deadline=None,  # the first example of a run pays for loading and compiling
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("yoco")

BACKENDS = ("cpu", "reference", "cuda", "emulated")
REQUIRE_CUDA = os.environ.get("YOCO_TEST_REQUIRE_CUDA") == "1"


@dataclass(frozen=True)
class Backend:
    """What a test needs to know about the back end it runs on."""

    name: str
    device: str
    ops: ModuleType  # yoco_ext.ops or yoco_ext.reference: the public functions
    dtypes: tuple[torch.dtype, ...]

    @property
    def emulated(self) -> bool:
        """True where a thousand tokens take seconds: choose small shapes."""
        return self.name == "emulated"

    @property
    def fused(self) -> bool:
        return self.name != "reference"


def available_backends() -> list[str]:
    names = ["cpu", "reference"]
    # A promised GPU that is missing must fail, so it is put on the list and the fixture reports it.
    if REQUIRE_CUDA or torch.cuda.is_available():
        names.append("cuda")
    if _library.emulated_library() is not None:
        names.append("emulated")
    return names


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", action="append", choices=BACKENDS, help="run only these back ends (repeatable)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "backends(*names): run this test only on these back ends")
    config.addinivalue_line("markers", "unpoisoned: torch.empty is left alone in this test")


def pytest_report_header(config: pytest.Config) -> str:
    return f"back ends: {', '.join(available_backends())}; not here: " + (
        ", ".join(name for name in BACKENDS if name not in available_backends()) or "none"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("backends")
    wanted = marker.args if marker else BACKENDS
    chosen = metafunc.config.getoption("backend") or BACKENDS
    names = [name for name in available_backends() if name in wanted and name in chosen]
    absent = pytest.mark.skip(reason=f"runs on {' or '.join(wanted)} only, which is not here (or was not chosen)")
    metafunc.parametrize("backend", names or [pytest.param(None, id="absent", marks=absent)], indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The back end under test; on "emulated" the CPU dispatch key is switched to the emulated CUDA kernels."""
    name = request.param
    low = (torch.bfloat16, torch.float16, torch.float32)
    if name == "reference":
        yield Backend(name, "cpu", yoco_ext.reference, (*low, torch.float64))
        return
    fused = importlib.import_module("yoco_ext.ops")  # needs the op library; the reference does not
    if name == "cuda":
        if not torch.cuda.is_available():
            pytest.fail("YOCO_TEST_REQUIRE_CUDA=1 but torch.cuda.is_available() is False")
        yield Backend(name, "cuda", fused, low)
        return
    with _library.use_backend(name):
        yield Backend(name, "cpu", fused, low if name == "emulated" else (*low, torch.float64))


@pytest.fixture(autouse=True)
def seed() -> int:
    """A fresh seed per test; YOCO_TEST_SEED repeats one (pytest shows the line when a test fails)."""
    value = int(os.environ.get("YOCO_TEST_SEED") or secrets.randbits(31))
    print(f"YOCO_TEST_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every uninitialised tensor (outputs and workspaces of the ops too) is NaN, integers are their maximum."""
    if request.node.get_closest_marker("unpoisoned"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
