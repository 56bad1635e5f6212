"""Damaged files by the thousand, read and acted on: what comes of it must be an answer, or one sentence of ours.

    python tools/fuzz.py --cases 5000 --seed 1
    python tools/fuzz.py --seed 1 --only 1234      that case again, with its traceback

A case damages one file of small real ones (tests/damage.py) and reads them, or acts on them. It fails where anything
but ``RankscopeError`` is raised (a warning too), where the message is not one sentence, where a refusal leaves anything
on disk, where it takes longer than ``--seconds``, or needs ``--megabytes`` more memory than all before. Adapters of all
methods of PEFT are among the files where PEFT is installed.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from types import FrameType

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from damage import ACTS, Act, make_sources, read, tried


class TooSlowError(BaseException):
    """No ``except Exception`` on the way may take it for an error of a library."""


def method_sources(home: Path) -> dict[str, Act]:
    """An adapter of every method of PEFT with its base, in folders of their own; none without PEFT."""
    try:
        from peft_models import LINEAR, Saved, import_peft, two

        peft = import_peft()
    except ImportError:
        return {}
    acts = {}
    for name, (config, _, _) in LINEAR.items():
        place = home / name
        (place / "base").mkdir(parents=True)
        saved = Saved(peft, place, name.partition(",")[0], two(), target_modules=["q", "k"], **config)
        shutil.move(saved.base_file, place / "base")
        acts[f"read {name}"] = read(f"{name}/adapter", f"{name}/base")
    return acts


def one(act: Act, sources: Path, rng: random.Random, seconds: float) -> tuple[str, str]:
    """One case in a folder of its own; any exception is a failure."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlowError

    signal.signal(signal.SIGALRM, stop)
    faulthandler.dump_traceback_later(10 * seconds, exit=True)  # a library that never comes back to Python
    signal.setitimer(signal.ITIMER_REAL, seconds)
    home = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        return tried(act, sources, home, rng)
    except TooSlowError:
        return "", f"FAILED: took more than {seconds:g} s"
    except Exception:
        return "", "FAILED: " + traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(home, ignore_errors=True)


def peak() -> float:
    """Most memory that the process has had, MiB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this case alone")
    parser.add_argument("--seconds", type=float, default=20.0, help="that a case may take [20]")
    parser.add_argument("--megabytes", type=float, default=256.0, help="that a case may add to the peak memory [256]")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    began, ends, failures = time.monotonic(), Counter[str](), 0
    with tempfile.TemporaryDirectory(prefix="fuzz-sources-") as folder:
        sources = Path(folder)
        make_sources(sources)
        acts = {**ACTS, **method_sources(sources)}
        for act in acts.values():  # sound files first: libraries take their memory, and every act must work
            one_home = Path(tempfile.mkdtemp(dir=sources))
            act.run(sources, one_home / "out")
            shutil.rmtree(one_home)
        for number in range(options.cases) if options.only is None else [options.only]:
            rng, before = random.Random(f"{options.seed}:{number}"), peak()
            name = rng.choice(list(acts))
            damage, found = one(acts[name], sources, rng, options.seconds)
            if peak() - before > options.megabytes:
                found = f"FAILED: needed {peak() - before:.0f} MiB more than all cases before"
            ends[found.partition(":")[0]] += 1
            if found.startswith("FAILED") or options.only is not None:
                failures += found.startswith("FAILED")
                print(f"--seed {options.seed} --only {number}: {name}, {damage}\n{found}", flush=True)
    counts = ", ".join(f"{end} {count}" for end, count in sorted(ends.items()))
    print(
        f"{sum(ends.values())} cases of {len(acts)} acts: {counts}; {time.monotonic() - began:.0f} s, {peak():.0f} MiB"
    )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
