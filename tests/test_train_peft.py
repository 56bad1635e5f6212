"""What a study leaves behind, read by PEFT and transformers: the same model, the same update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankscope.lora import load
from rankscope.train.config import make_study_config
from rankscope.train.docs import DocsTask, embedded_base_folder
from rankscope.train.study import Study, run_study

# transformers deprecates names that PEFT still calls.
pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning:transformers")

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    config = make_study_config(
        {"ranks": (3,), "steps": 12, "evaluations": 0, "methods": ("rslora",), "lrs": (1e-2,), "full_lrs": (1e-3,)},
        "test",
    )
    return run_study(config, tmp_path_factory.mktemp("docs") / "study")


@pytest.fixture(scope="module")
def adapted(study: Study) -> Any:
    base = transformers.AutoModelForCausalLM.from_pretrained(embedded_base_folder())
    return peft.PeftModel.from_pretrained(base, study.path(study.done()[1].run) / "adapter").eval()


def test_it_has_learned_something(study: Study) -> None:
    before = study.score(study.done()[0])
    for record in study.done()[1:]:
        assert study.score(record) < before - 0.02
        assert record.before["test"] == pytest.approx(study.done()[0].metrics["test"], rel=1e-6)


def test_peft_gives_the_logits_that_we_trained(study: Study, adapted: Any) -> None:
    task = DocsTask()
    model = task.model(0)
    tokens = task.batch(0, 0, 3)["tokens"]
    with torch.no_grad():
        base = model(tokens)
        load(model, study.path(study.done()[1].run) / "adapter")
        ours, theirs = model(tokens), adapted(tokens).logits
    assert torch.allclose(ours, theirs, atol=5e-4)
    assert (ours - base).abs().max() > 0.5


def test_spectra_are_those_of_pefts_merged_weights(study: Study, adapted: Any) -> None:
    store = study.store(study.done()[1].run)
    base = dict(transformers.AutoModelForCausalLM.from_pretrained(embedded_base_folder()).double().named_parameters())
    merged = dict(adapted.double().merge_and_unload().named_parameters())
    assert len(store) == 28
    for name in store:
        difference = (merged[f"{name}.weight"] - base[f"{name}.weight"]).detach().numpy()
        expected = np.linalg.svd(difference, compute_uv=False)
        assert store[name].singular_values().numpy() == pytest.approx(expected[:3], abs=2e-5 * expected[0])


def test_the_full_update_is_tuned_minus_base(study: Study) -> None:
    """Adding it to the base gives the metrics that the run recorded."""
    record = study.done()[-1]
    assert record.run.method == "full"
    task = DocsTask()
    model = task.model(0)
    store = study.store(record.run)
    from rankscope.formats.file_io import read_tensors

    with torch.no_grad():
        for name in store:
            model.get_submodule(name).weight += store[name].dense()
        for name, update in read_tensors(study.path(record.run) / "update.safetensors").items():
            if update.ndim == 1:
                model.get_parameter(name).add_(update)
        measured = task.evaluate(model, "test", torch.device("cpu"))
    assert measured == pytest.approx(record.metrics["test"], rel=1e-5)


def test_initial_factors_are_kept(study: Study) -> None:
    path: Path = study.path(study.done()[1].run) / "initial"
    import rankscope

    initial = rankscope.open(path)
    assert all(initial[name].norm == 0 for name in initial)  # B starts at zero
