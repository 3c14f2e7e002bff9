"""One process of those that test_ranks.py starts: ``python ranks_main.py RANK SIZE FOLDER`` runs all scenarios."""

import sys

import ranks
import ranks_wrapped  # noqa: F401 - whose scenarios it adds to the others

ranks.main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
