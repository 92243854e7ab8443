"""What the training loop says about steps that changed nothing."""

import jax
import jax.numpy as jnp
import pytest
from made_up import made_up_experiment

from tml.mesh import make_mesh
from tml.metrics import open_sinks
from tml.train import Log


def test_a_run_that_continues_reports_only_its_own_skipped_steps(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = made_up_experiment()
    with open_sinks(tmp_path, experiment.train.num_steps, 7) as sinks:
        log = Log(experiment, make_mesh(experiment.mesh, jax.devices()[:1]), sinks, 7, 3)
        for step, num_skipped in ((8, 3), (9, 3), (10, 4), (11, 4)):
            log.add(step, {"tokens": jnp.float32(5.0), "num_skipped": jnp.int32(num_skipped)})
        log.finish()
    assert capsys.readouterr().err.splitlines() == ["step 10 was not finite and changed nothing (4 so far)"]
