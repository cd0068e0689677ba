"""Door of tests/megatron_unit_tests.py."""

if __name__ == "__main__":
    import sys

    sys.path[0] = __file__.rpartition("tools")[0]  # not tools/: profile.py would hide the library's
    from tests.megatron_unit_tests import main

    sys.exit(main())
