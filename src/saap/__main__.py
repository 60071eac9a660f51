"""`python -m saap`, and what `torchrun -m saap` starts."""

from saap.cli import main

if __name__ == "__main__":
    main()
