from tests.flow.conftest import broker, router  # noqa: F401 - fixtures
