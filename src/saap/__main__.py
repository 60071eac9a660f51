"""Entry point of `python -m saap` and `torchrun -m saap`."""

from saap.cli.app import main

if __name__ == "__main__":
    main()
