"""Do two seeds learn the same directions? Two adapters on the embedded base, compared layer by layer.

python examples/two_seeds.py
"""

import tempfile
from pathlib import Path

import rankscope
from rankscope import plots


def main() -> None:
    config = rankscope.StudyConfig(
        ranks=(8,), lrs=(0.01,), full=False, seeds=(0, 1), steps=60, targets=("q_proj,v_proj",)
    )
    with tempfile.TemporaryDirectory() as folder:
        study = rankscope.run_study(config, Path(folder) / "study")
        a, b = (study.store(record.run) for record in study.done() if record.run.method == "lora")
        result = rankscope.compare(a, b)
        print(result)
        plots.save(plots.plot_overlap(result), Path("two_seeds.png"))
        print("wrote two_seeds.png")


if __name__ == "__main__":
    main()
