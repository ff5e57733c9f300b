#!/usr/bin/env bash
# aeon 1.6.0: the Nemenyi test of k methods takes the critical value of k + 1, and joins methods that differ.
#
# aeon.benchmarking.stats.nemenyi_test reads its list of critical values at [k], where the value of k methods stands at
# [k - 1]: of two methods it is 2.344 in the place of 1.960 (Demšar 2006, Table 5). Seen: of 14 cases at 0.05, two methods
# of average ranks 1.214 and 1.786 differ by 0.572, which is above 1.960·√(6/84) = 0.524, and are of one clique all the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check aeon==1.6.0 scipy==1.17.1 numpy==2.3.5
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import aeon
import numpy as np
from aeon.benchmarking.stats import nemenyi_test
from scipy.stats import studentized_range

ranks, num_cases = np.array([1.214, 1.786]), 14
distance = studentized_range.ppf(0.95, 2, np.inf) / 2**0.5 * (2 * 3 / (6 * num_cases)) ** 0.5
joined = bool(nemenyi_test(ranks, num_cases, 0.05)[0, 1])
print(f"aeon {aeon.__version__}: ranks {ranks[1] - ranks[0]:.3f} apart, critical distance {distance:.3f}, joined: {joined}")
assert ranks[1] - ranks[0] > distance and joined, "the behaviour has changed"
PYTHON
