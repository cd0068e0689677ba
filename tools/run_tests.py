"""Door of tests/run.py: `make test`."""

if __name__ == "__main__":
    import sys

    sys.path[0] = __file__.rpartition("tools")[0]  # not tools/: profile.py would hide the library's
    from tests.run import main

    sys.exit(main())
