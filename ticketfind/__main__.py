"""``python -m ticketfind``."""

from ticketfind.cli import main

if __name__ == "__main__":
    main()
