"""Package map. Imports nothing but setuptools: pip runs this file where torch is absent."""

from setuptools import setup

setup(
    packages=["uniformer", "uniformer_kernels"],
    # One level down, so that a checkout does not shadow the `kernels` package of PyPI.
    package_dir={"uniformer": "uniformer", "uniformer_kernels": "kernels/uniformer_kernels"},
    package_data={"uniformer": ["py.typed", "labels/*.txt"], "uniformer_kernels": ["py.typed"]},
)
