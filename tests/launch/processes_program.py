"""Joins the processes of a run and agrees with them: the program that tests/launch/test_processes.py starts twice.

python tests/launch/processes_program.py --flags… CONFIG_HASH ERROR

Its values are the config hash and its own code; ERROR, if not empty, is what a check of this process alone finds.
"""

import sys

from absl import flags

from launch import processes


def main() -> int:
    _, config, error = flags.FLAGS(sys.argv)
    place = processes.read_place()

    def check() -> str:
        if error:
            raise ValueError(error)
        return config

    try:
        processes.join(place)
        checked = processes.together(place, check)
        processes.agree(place, {"config": checked, "code": processes.code_hash()})
    except ValueError as problem:
        print(f"error: {problem}", flush=True)
        return 1
    import jax

    print(f"{jax.process_count()} processes, {len(jax.devices())} devices", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
