import pytest


@pytest.fixture(scope="session", autouse=True)
def shared_models(tmp_path_factory):
    """The claims' classifiers are trained once per session, away from the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADWISE_CACHE", str(tmp_path_factory.mktemp("models")))
        yield
