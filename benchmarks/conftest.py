def pytest_xdist_auto_num_workers() -> int:
    """None: what is timed has the machine to itself, and pytest-benchmark times nothing in a worker."""
    return 0
