"""Plant an update of known rank, train at several ranks, and read the rank back in two ways.

python examples/planted_rank.py
"""

import tempfile
from pathlib import Path

import rankscope
from rankscope.spectra import mp_count
from rankscope.train.planted import PlantedTask

PLANTED = 3


def main() -> None:
    config = rankscope.StudyConfig(task="planted", planted_rank=PLANTED, ranks=(1, 2, 3, 4, 8), batch=128)
    truth = PlantedTask(PLANTED, config.planted_noise)
    with tempfile.TemporaryDirectory() as folder:
        study = rankscope.run_study(config, Path(folder) / "study")
        print(f"planted rank {PLANTED}; loss at each rank, beside the least that rank can reach")
        for record in study.done():
            if record.run.rank is not None:
                print(f"  r = {record.run.rank}:  {study.score(record):.4f}  least {truth.floor(record.run.rank):.4f}")
        full = study.store(study.done()[-1].run)
        for name in full:
            spectrum = rankscope.Spectrum.of(full[name])
            above = mp_count(spectrum)
            print(f"full fine-tuning, {name}: {above} singular values above the noise edge, k90 {spectrum.k90}")


if __name__ == "__main__":
    main()
