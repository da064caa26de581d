"""The one part that needs a compiler; without one, or on another processor, torch does its work."""

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel


class PlatformWheel(bdist_wheel):
    """A wheel for every Python on one platform: the kernels are loaded as a plain library."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    cmdclass={"bdist_wheel": PlatformWheel},
    ext_modules=[
        Extension(
            # A plain shared library that adapters/kernels/native_ops.py loads, not a module.
            "adapters.kernels.hira_cpu",
            sources=[
                f"adapters/kernels/native/{name}.cpp"
                for name in ("hira_cpu", "float32_avx2", "float32_avx512")
            ],
            depends=[f"adapters/kernels/native/{name}.h" for name in ("call", "float32")],
            language="c++",
            extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden", "-w"],
            optional=True,
        )
    ],
)
