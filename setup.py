"""Packaging of msm_dist: versions are floors here, the tested set is constraints.txt."""

from setuptools import setup

BASE = [
    "torch>=2.11",
    "torchaudio>=2.11",
    "soundfile>=0.12",
    "soxr>=0.5",
    "safetensors>=0.4.3",
    "numpy>=1.26",
    "pydantic>=2.8",
    "pyyaml>=6.0",
    "typer>=0.12",
    "rich>=13.0",
]
TRAIN = [
    "deepspeed>=0.19.8",
    "ninja>=1.11",
    "webdataset>=1.0.2",
    "braceexpand>=0.1.7",
    "triton>=3.6; platform_system == 'Linux'",
    "submitit>=1.5.4",
    "tensorboard>=2.18",
    "matplotlib>=3.8",
    "urllib3>=2.2",
]
VIDEO = ["torchcodec>=0.12"]
PARQUET = ["pyarrow>=15.0"]
S3 = ["s3fs>=2024.6"]
GCS = ["gcsfs>=2024.6"]
EVAL = ["scikit-learn>=1.4", "matplotlib>=3.8", "huggingface_hub>=0.30"]
DEV = [
    "pytest>=8.0",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "librosa>=0.10.2",
    "ruff>=0.6",
    "setuptools>=77",
    "s3fs>=2024.6",
    "moto>=5.0",
    "py-partiql-parser>=0.5",
    "flask>=3.0",
    "flask-cors>=4.0",
]

setup(
    name="msm-dist",
    version="0.1.0",
    description="Masked spectrogram modeling with masked autoencoders, at any scale",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "msm_dist",
        "msm_dist.data",
        "msm_dist.doctor",
        "msm_dist.engine",
        "msm_dist.evaluate",
        "msm_dist.model",
        "msm_kernels",
        "msm_configs",
    ],
    # Top-level modules named `kernels` or `configs` would collide with those of unrelated distributions.
    package_dir={"msm_kernels": "kernels", "msm_configs": "configs"},
    package_data={
        "msm_configs": ["*.yaml", "deepspeed/*.json", "sweeps/*.yaml", "finetune/*.yaml", "study/*.yaml"],
        "msm_kernels": ["configurations.json"],
    },
    install_requires=BASE,
    extras_require={"train": TRAIN, "video": VIDEO, "parquet": PARQUET, "s3": S3, "gcs": GCS, "eval": EVAL, "dev": DEV},
    entry_points={"console_scripts": ["msm-dist=msm_dist.cli:main"]},
)
