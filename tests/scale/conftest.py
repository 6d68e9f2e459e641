from tests.pipeline.conftest import new_clone, reproduced  # noqa: F401
