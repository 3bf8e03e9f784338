"""How long one private set intersection takes, both sides in this process: `python -m <this module> 100000 100000`.

Prints one JSON object: seconds of wall clock and of processor time (both sides, all threads), bytes each side sends,
peak memory of the process, other load on the machine before the run. Half of the smaller list is common. The result is
compared with the plaintext twin; a difference ends the run with an error.
"""

import argparse
import json
import os
import resource
import time

import numpy as np

from privacy.permutation import random_order
from privacy.private_set_intersection import (
    intersect_in_the_clear,
    intersect_one_sided,
    intersect_two_way,
    padded_size,
    traffic,
)
from privacy.ristretto import cores

FORMS = {"two-way": intersect_two_way, "one-sided": intersect_one_sided}


def measure(label_holder_rows: int, owner_rows: int, form: str) -> dict[str, object]:
    """One exchange over USCC-like ids of 18 characters."""
    shared = min(label_holder_rows, owner_rows) // 2
    holder_ids = [f"91{row:016d}" for row in range(label_holder_rows)]
    owner_ids = [f"91{row:016d}" for row in range(label_holder_rows - shared, label_holder_rows - shared + owner_rows)]
    order, job = random_order(label_holder_rows), os.urandom(32)
    load = os.getloadavg()[0]
    wall, processor = time.perf_counter(), time.process_time()
    result = FORMS[form](holder_ids, order, owner_ids, job=job)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    expected = intersect_in_the_clear(holder_ids, order, owner_ids, job=job)
    if not (np.array_equal(result.rows, expected.rows) and np.array_equal(result.known, expected.known)):
        raise SystemExit(f"{form}: differs from the plaintext twin")
    from_holder, from_owner = traffic(padded_size(label_holder_rows), padded_size(owner_rows), form)
    return {
        "form": form,
        "label_holder_rows": label_holder_rows,
        "owner_rows": owner_rows,
        "found": int(result.known.sum()),
        "seconds": round(wall, 2),
        "processor_seconds": round(processor, 2),
        "cores": cores(),
        "load_before": round(load, 2),
        "bytes_from_label_holder": from_holder,
        "bytes_from_owner": from_owner,
        "peak_megabytes": peak // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("label_holder_rows", type=int)
    parser.add_argument("owner_rows", type=int)
    parser.add_argument("--form", choices=sorted(FORMS), default="two-way")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.label_holder_rows, arguments.owner_rows, arguments.form)))


if __name__ == "__main__":
    main()
