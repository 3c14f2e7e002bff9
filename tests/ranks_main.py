"""Runs the scenarios of test_ranks.py: ``python ranks_main.py FOLDER``."""

import ranks
import ranks_elementwise  # noqa: F401 - whose scenarios it runs
import ranks_wrapped  # noqa: F401 - and those of torch's wrappers

ranks.main()
