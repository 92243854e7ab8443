"""Trains a few steps as one of several processes and prints the losses: `processes_program.py PORT INDEX COUNT`."""

import dataclasses
import os
import sys

DEVICES = 4


def main(port: int, index: int, count: int) -> None:
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={DEVICES // count} --xla_backend_optimization_level=0"
    )
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if count > 1:
        jax.distributed.initialize(f"localhost:{port}", num_processes=count, process_id=index)
    from made_up import made_up_batch, made_up_experiment

    from tml.config import ExpertDispatch, MeshConfig
    from tml.mesh import make_mesh, row_part
    from tml.train_step import init_state, make_train_step, to_devices

    plain = made_up_experiment(mesh=MeshConfig(expert=2, context=2))
    moe = dataclasses.replace(plain.model.moe, dispatch=ExpertDispatch.RAGGED_ALL_TO_ALL, capacity_factor=2.0)
    experiment = dataclasses.replace(plain, model=dataclasses.replace(plain.model, num_dense_layers=0, moe=moe))
    mesh = make_mesh(experiment.mesh)
    step, state = make_train_step(experiment, mesh), init_state(jax.random.key(0), experiment, mesh)
    part = row_part(mesh, jax.process_index())
    for number in range(3):
        batch = made_up_batch(experiment, number)
        size = experiment.data.rows_per_batch // part.count
        mine = jax.tree.map(lambda rows, size=size: rows[part.index * size : (part.index + 1) * size], batch)
        state, metrics = step(state, to_devices(mine, mesh))
        loss = jax.device_get(metrics["loss"])
        print(f"loss {float(loss.total) / float(loss.count):.6f}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
