"""A package, so that `test_introduction.py` does not collide with the one of `tests/models`."""
