"""`python -m dan_fast` is `dan-fast`."""

from dan_fast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
