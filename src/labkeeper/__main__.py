"""`python -m labkeeper`."""

from labkeeper.cli import main

if __name__ == "__main__":
    main()
