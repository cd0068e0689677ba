"""Door of `megatron-mone calibrate`."""

if __name__ == "__main__":
    import sys

    sys.path[0] = __file__.rpartition("tools")[0]  # not tools/: profile.py would hide the library's
    from megatron_mone.commands.calibrate_nodes import main

    sys.exit(main())
