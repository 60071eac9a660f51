"""The results book; see `python benchmarks/book.py --help`."""

if __name__ == "__main__":  # child processes of an experiment import this file, and need no other experiment
    from harness.command import main

    main()
