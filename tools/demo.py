"""Door of the demo: `python -m tools.demo [--steps N]`, and `make demo`."""

if __name__ == "__main__":
    import sys

    from megatron_mone.demo.command import main

    sys.exit(main())
