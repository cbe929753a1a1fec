"""``python -m halfstep.cli``."""

from halfstep.cli.app import main

if __name__ == "__main__":
    main()
