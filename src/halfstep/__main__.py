"""``python -m halfstep``, as ``torchrun -m halfstep`` runs it on several ranks."""

from halfstep.cli.app import main

if __name__ == "__main__":
    main()
