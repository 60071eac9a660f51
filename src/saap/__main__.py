"""`python -m saap`, and what `torchrun -m saap` starts."""

from saap.cli.app import main

if __name__ == "__main__":
    main()
