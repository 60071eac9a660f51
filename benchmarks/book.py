"""The results book; `python benchmarks/book.py --help` says more."""

if __name__ == "__main__":  # processes that an experiment starts import this file, and need no other experiment
    from harness.command import main

    main()
