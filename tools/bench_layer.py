"""Door of `megatron-mone bench layer`."""

if __name__ == "__main__":
    import sys

    sys.path[0] = __file__.rpartition("tools")[0]  # not tools/: profile.py would hide the library's
    from megatron_mone.commands.bench import main

    sys.exit(main(["layer", *sys.argv[1:]]))
